// operands.cpp - see operands.h.
#include "bindings/operands.h"

namespace pyflowmap {
namespace {

bool fits(const dlpack::Tensor& t, const Layout& layout) {
  if (t.ndim != layout.like.ndim || !same_device(t, layout.like)) return false;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] != layout.like.shape[d]) return false;
  }
  if (layout.columns == 0) return true;
  for (int i = 0; i < layout.inner; ++i) {
    if (t.strides[layout.order[i]] != layout.like.strides[layout.order[i]]) return false;
  }
  return true;
}

// ---- aliasing -----------------------------------------------------------------------------------------------------

struct Span {
  uintptr_t begin, end;
  int64_t stride, width;  // bytes
};

Span span_of(const Operand& o, const Layout& layout) {
  const int64_t size = size_of(o.dtype);
  const auto begin = reinterpret_cast<uintptr_t>(o.data);
  const int64_t last = (layout.rows - 1) * o.row_stride + layout.columns;
  return {begin, begin + static_cast<uintptr_t>(last * size), o.row_stride * size, layout.columns * size};
}

// Rows of two operands may interleave (the halves of a chunk(2, 1)) without touching.
bool overlap(const Span& a, const Span& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  if (a.stride != b.stride || a.stride == 0) return true;
  const int64_t shift = static_cast<int64_t>(b.begin - a.begin) % a.stride;
  const int64_t offset = shift < 0 ? shift + a.stride : shift;
  return offset < a.width || a.stride - offset < b.width;
}

}  // namespace

bool storage_type(const dlpack::Tensor& t, DType* out) {
  if (t.dtype.lanes != 1) return false;
  if (t.dtype.code == dlpack::kFloat && t.dtype.bits == 32) *out = DType::f32;
  else if (t.dtype.code == dlpack::kFloat && t.dtype.bits == 16) *out = DType::f16;
  else if (t.dtype.code == dlpack::kFloat && t.dtype.bits == 64) *out = DType::f64;
  else if (t.dtype.code == dlpack::kBfloat && t.dtype.bits == 16) *out = DType::bf16;
  else return false;
  return true;
}

bool is_int64(const dlpack::Tensor& t) {
  return t.dtype.code == dlpack::kInt && t.dtype.bits == 64 && t.dtype.lanes == 1;
}

bool same_device(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.device.device_type == b.device.device_type && a.device.device_id == b.device.device_id;
}

bool even_stride(const int64_t* shape, const int64_t* strides, int dims, int64_t* stride) {
  bool first = true;
  int64_t expected = 0;
  for (int d = dims - 1; d >= 0; --d) {
    if (shape[d] == 1) continue;
    if (first) *stride = strides[d];
    else if (strides[d] != expected) return false;
    expected = strides[d] * shape[d];
    first = false;
  }
  return true;
}

bool find_layout(const dlpack::Tensor& like, int leading, Layout* layout) {
  if (leading > like.ndim || like.ndim > 64) return false;
  layout->like = like;
  layout->leading = leading;
  layout->rows = layout->columns = 1;
  layout->inner = 0;
  for (int d = 0; d < leading; ++d) layout->rows *= like.shape[d];
  for (int d = leading; d < like.ndim; ++d) {
    layout->columns *= like.shape[d];
    if (like.shape[d] != 1) layout->order[layout->inner++] = d;
  }
  if (layout->columns == 0) return true;
  int* order = layout->order;
  for (int i = 1; i < layout->inner; ++i) {  // insertion sort: few dimensions, usually in order already
    const int d = order[i];
    int at = i;
    for (; at > 0 && like.strides[order[at - 1]] < like.strides[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t expected = 1;
  layout->in_order = true;
  for (int i = layout->inner - 1; i >= 0; --i) {
    if (like.strides[order[i]] != expected) return false;
    expected *= like.shape[order[i]];
    if (i > 0 && order[i - 1] > order[i]) layout->in_order = false;
  }
  return true;
}

bool read_operand(const dlpack::Tensor& t, const Layout& layout, Operand* out) {
  out->data = t.data;
  out->row_stride = layout.columns;  // a single row
  return fits(t, layout) && storage_type(t, &out->dtype) &&
         even_stride(t.shape, t.strides, layout.leading, &out->row_stride);
}

bool aliasing_is_fine(const Operand* x, int inputs, const Operand* y, int outputs, const Layout& layout) {
  if (layout.rows == 0 || layout.columns == 0) return true;
  for (int k = 0; k < outputs; ++k) {
    const Operand& to = y[k];
    if (!to.data) continue;
    if (layout.rows > 1 && to.row_stride < layout.columns) return false;  // expanded, or rows that overlap themselves
    const Span span = span_of(to, layout);
    for (int j = 0; j < inputs; ++j) {
      const Operand& from = x[j];
      const bool same = from.data == to.data && from.row_stride == to.row_stride && from.dtype == to.dtype;
      if (!same && overlap(span, span_of(from, layout))) return false;
    }
    for (int l = 0; l < k; ++l) {
      if (y[l].data && overlap(span, span_of(y[l], layout))) return false;
    }
  }
  return true;
}

bool make_map(const Layout& layout, const int64_t* strides, IndexMap* map) {
  int64_t expected = 1;
  bool identity = true;
  for (int i = layout.inner - 1; i >= 0; --i) {
    identity &= strides[layout.order[i]] == expected;
    expected *= layout.like.shape[layout.order[i]];
  }
  map->dims = 0;
  if (identity) return true;
  for (int i = 0; i < layout.inner; ++i) {
    const int d = layout.order[i];
    const int64_t size = layout.like.shape[d], stride = strides[d];
    const int last = map->dims - 1;
    if (last >= 0 && map->stride[last] == stride * size) {  // two dimensions that step as one
      map->size[last] *= size;
      map->stride[last] = stride;
      continue;
    }
    if (map->dims == kMaxDims) return false;
    map->size[map->dims] = size;
    map->stride[map->dims++] = stride;
  }
  return true;
}

}  // namespace pyflowmap
