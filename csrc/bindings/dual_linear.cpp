// dual_linear.cpp - `dual_linear` of Python objects. Contract: dual_linear/dual_linear.h.
#include "dual_linear/dual_linear.h"

#include "bindings/bindings.h"
#include "bindings/border.h"
#include "bindings/operands.h"
#include "bindings/rows.h"

namespace pyflowmap {
namespace {

constexpr int64_t kLargeWork = 1 << 20;  // products; below, letting go of the lock costs more than it gives

enum Position { kX, kDX, kWeight, kBias, kY, kDY };

// (..., columns) as `rows` rows that step evenly.
LinearRows rows_of(Tensors& tensors, int i, const DualLinearParams& p, int64_t rows, int64_t columns) {
  LinearRows found;
  const dlpack::Tensor* t = tensors.at(i);
  if (!t) return found;
  DType dtype;
  const int lead = t->ndim - 1;
  int64_t count = 1;
  for (int d = 0; d < lead; ++d) count *= t->shape[d];
  const bool fits = lead >= 0 && storage_type(*t, &dtype) && dtype == p.dtype && count == rows &&
                    t->shape[lead] == columns && (t->strides[lead] == 1 || columns == 1) &&
                    even_stride(t->shape, t->strides, lead, &found.stride);
  if (!fits) {
    tensors.refuse();
    return {};
  }
  found.data = t->data;
  return found;
}

// 1: autograd would record the call, or someone watches. -1: a Python error.
int is_watched(PyObject* tuple) {
  const int watched = road_is_watched();
  if (watched != 0) return watched;
  const int grad = grad_enabled();
  if (grad <= 0) return grad;
  for (int i = kX; i <= kBias; ++i) {
    PyObject* tensor = PyTuple_GET_ITEM(tuple, i);
    const int plain = tensor == Py_None ? 1 : is_plain(tensor, true, true);
    if (plain != 1) return plain < 0 ? -1 : 1;
  }
  return 0;
}

}  // namespace

PyObject* dual_linear(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 1 || !PyTuple_CheckExact(args[0]) || PyTuple_GET_SIZE(args[0]) != kDY + 1) {
    PyErr_SetString(PyExc_TypeError, "dual_linear takes ((x, dx, weight, bias, y, dy),)");
    return nullptr;
  }
  Tensors tensors(args[0]);
  DualLinearParams p;
  const dlpack::Tensor *x = tensors.at(kX), *weight = tensors.at(kWeight);
  if (!x || !weight || x->ndim < 1 || weight->ndim != 2 || !storage_type(*x, &p.dtype)) {
    return as_bool(tensors.answer() == kError ? kError : kNo);
  }
  p.outputs = weight->shape[0];
  p.inputs = weight->shape[1];
  p.rows = 1;
  for (int d = 0; d < x->ndim - 1; ++d) p.rows *= x->shape[d];
  p.x = rows_of(tensors, kX, p, p.rows, p.inputs);
  p.dx = rows_of(tensors, kDX, p, p.rows, p.inputs);
  p.weight = rows_of(tensors, kWeight, p, p.outputs, p.inputs);
  p.y = rows_of(tensors, kY, p, p.rows, p.outputs);
  p.dy = rows_of(tensors, kDY, p, p.rows, p.outputs);
  p.bias = tensors.dense(kBias, p.outputs, p.dtype);
  if (!p.y || !p.dx != !p.dy || !within_limits(p)) tensors.refuse();
  if (tensors.answer() == kYes) {
    const int watched = is_watched(args[0]);
    if (watched < 0) return nullptr;
    if (watched) tensors.refuse();
  }
  return as_bool(tensors.run(
      "dual_linear", p.rows * p.inputs * p.outputs > kLargeWork, [&] { return dual_linear_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(dual_linear_cuda(p, device, stream)); }));
}

}  // namespace pyflowmap
