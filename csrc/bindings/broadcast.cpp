// broadcast.cpp - see broadcast.h.
#include "bindings/broadcast.h"

#include "bindings/operands.h"

namespace pyflowmap {

Broadcast::Broadcast(Tensors* tensors, int like) : tensors_(tensors) {
  const dlpack::Tensor* t = tensors->at(like);
  if (!t) return;
  if (t->ndim < 1 || t->ndim > kDims) {
    tensors->refuse();
    return;
  }
  dims_ = t->ndim - 1;
  for (int d = 0; d < dims_; ++d) shape_[d] = t->shape[d];
  columns_ = t->shape[dims_];
}

void Broadcast::add(int i, Rows* rows) {
  const dlpack::Tensor* t = tensors_->at(i);
  if (!t) return;
  const int last = t->ndim - 1;
  if (count_ == kMost || t->ndim < 1 || last > dims_ || t->shape[last] != columns_) return tensors_->refuse();
  if ((t->shape[last] > 1 && t->strides[last] != 1) || !storage_type(*t, &rows->dtype)) return tensors_->refuse();
  // A vector per sample stands for all between; otherwise dimensions are matched from the right.
  const bool vector = last == 1 && dims_ > 1;
  for (int d = 0; d < last; ++d) {
    const int to = vector ? 0 : d + dims_ - last;
    if (t->shape[d] != shape_[to] && t->shape[d] != 1) return tensors_->refuse();
    strides_[count_][to] = t->shape[d] == 1 ? 0 : t->strides[d];
  }
  rows->data = t->data;
  rows_[count_++] = rows;
}

bool Broadcast::finish(RowShape* shape) {
  if (tensors_->answer() != kYes) return false;
  shape->columns = columns_;
  int groups = 0;  // joined so far, outermost first
  int64_t size[kDims] = {};
  int64_t strides[kMost][kDims] = {};
  for (int d = 0; d < dims_; ++d) {
    if (shape_[d] == 1) continue;
    bool joins = groups > 0;
    for (int n = 0; joins && n < count_; ++n) joins = strides[n][groups - 1] == strides_[n][d] * shape_[d];
    if (!joins) ++groups;
    size[groups - 1] = joins ? size[groups - 1] * shape_[d] : shape_[d];
    for (int n = 0; n < count_; ++n) strides[n][groups - 1] = strides_[n][d];
  }
  if (groups > 3) {
    tensors_->refuse();
    return false;
  }
  for (int g = 0; g < 3; ++g) {
    const int from = g - (3 - groups);  // the innermost dimension is the last one
    shape->outer[g] = from >= 0 ? size[from] : 1;
    for (int n = 0; n < count_; ++n) rows_[n]->stride[g] = from >= 0 ? strides[n][from] : 0;
  }
  return true;
}

}  // namespace pyflowmap
