// broadcast.h - the operands of a row-wise kernel, broadcast to one shape and seen as Rows: outer dimensions that step
// alike in all of them are joined, so that three are enough for whatever a model passes.
#pragma once
#include "bindings/rows.h"

namespace pyflowmap {

// Add every operand, then `finish` once, which fills the Rows.
//
//   x (B, ..., D)     any strides, the last dimension dense; sizes of 1 are shared, as in torch (from the right)
//   vectors (B, D)    against more dimensions: one per sample
//
// A result that is shared (stride 0) is a sum over the dimensions that share it.
class Broadcast {
 public:
  Broadcast(Tensors* tensors, int like);  // the shape of tensor `like`, whose last dimension is the row

  void add(int i, Rows* rows);  // nothing where tensor i is None
  bool finish(RowShape* shape);

 private:
  static constexpr int kMost = 24, kDims = 8;
  Tensors* tensors_;
  int dims_ = 0, count_ = 0;
  int64_t shape_[kDims] = {}, columns_ = 0;
  int64_t strides_[kMost][kDims] = {};
  Rows* rows_[kMost] = {};
};

}  // namespace pyflowmap
