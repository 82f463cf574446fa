// norm_rope.cpp - `norm_rope` of Python objects. Contract: norm_rope/norm_rope.h.
#include "norm_rope/norm_rope.h"

#include <utility>

#include "bindings/bindings.h"
#include "bindings/operands.h"
#include "bindings/row_operands.h"

namespace pyflowmap {
namespace {

// Tensor i broadcast from the right to (B, H, N, columns), its rows in the kernel's order: batch, token, head.
Rows rows_of(Tensors& tensors, int i, const int64_t (&outer)[3], int64_t columns) {
  Rows rows;
  const dlpack::Tensor* t = tensors.at(i);
  if (!t) return rows;
  const int last = t->ndim - 1;
  bool fits = t->ndim >= 1 && t->ndim <= 4 && storage_type(*t, &rows.dtype) && t->shape[last] == columns &&
              (columns <= 1 || t->strides[last] == 1);
  for (int d = 0; fits && d < last; ++d) {
    const int to = d + 3 - last;
    fits = t->shape[d] == outer[to] || t->shape[d] == 1;
    rows.stride[to] = t->shape[d] == 1 ? 0 : t->strides[d];
  }
  if (!fits) {
    tensors.refuse();
    return {};
  }
  std::swap(rows.stride[1], rows.stride[2]);
  rows.data = t->data;
  return rows;
}

enum Position { kX, kWeight, kCos, kSin, kDX, kDWeight, kFirst };  // then what the directions have of their own

// What both directions read, and their own `results`. False with a Python error set.
template <size_t N>
bool read_all(const char* name, PyObject* const* args, Py_ssize_t nargs, Tensors& tensors, NormRope* p,
              Rows* const (&own)[N]) {
  if (nargs != 2) {
    PyErr_Format(PyExc_TypeError, "%s takes 2 arguments, got %zd", name, nargs);
    return false;
  }
  p->eps = PyFloat_AsDouble(args[1]);
  if (PyErr_Occurred()) return false;
  const dlpack::Tensor* x = tensors.at(kX);
  if (!x || x->ndim != 4) {
    tensors.refuse();
    return true;
  }
  const int64_t outer[3] = {x->shape[0], x->shape[1], x->shape[2]};
  p->shape = {{outer[0], outer[2], outer[1]}, x->shape[3]};
  Rows* const shared[] = {&p->x, &p->weight, &p->cos, &p->sin, &p->dx, &p->dweight};
  for (int i = 0; i < kFirst; ++i) {
    const bool angle = i == kCos || i == kSin;
    *shared[i] = rows_of(tensors, i, outer, angle ? p->shape.columns / 2 : p->shape.columns);
  }
  for (size_t i = 0; i < N; ++i) *own[i] = rows_of(tensors, kFirst + static_cast<int>(i), outer, p->shape.columns);

  const DType sums = p->x.dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto one_kind = [&](const Rows& r) {
    if (r && (r.dtype == DType::f64) != (sums == DType::f64)) tensors.refuse();
  };
  for (const Rows* r : shared) one_kind(*r);
  for (const Rows* r : own) one_kind(*r);
  const bool one_row = p->weight.stride[0] == 0 && p->weight.stride[1] == 0 && p->weight.stride[2] == 0;
  if (!p->weight || !one_row || static_cast<bool>(p->cos) != static_cast<bool>(p->sin)) tensors.refuse();
  if (p->cos && (p->shape.columns % 2 != 0 || p->cos.dtype != sums || p->sin.dtype != sums)) tensors.refuse();
  return true;
}

PyObject* refused(const Tensors& tensors) { return as_bool(tensors.answer() == kYes ? kNo : tensors.answer()); }

}  // namespace

PyObject* norm_rope(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  NormRopeForward p;
  Tensors tensors(args[0]);
  Rows* const own[] = {&p.y, &p.dy};
  if (!read_all("norm_rope", args, nargs, tensors, &p, own)) return nullptr;
  if (!p.y) tensors.refuse();
  if (tensors.answer() != kYes) return refused(tensors);
  return as_bool(tensors.run(
      "norm_rope", is_large(p.shape), [&] { return norm_rope_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(norm_rope_cuda(p, device, stream)); }));
}

PyObject* norm_rope_backward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  NormRopeBackward p;
  Tensors tensors(args[0]);
  Rows* const own[] = {&p.gy, &p.gdy, &p.gx, &p.gweight, &p.gdx, &p.gdweight};
  if (!read_all("norm_rope_backward", args, nargs, tensors, &p, own)) return nullptr;
  if ((!p.gy && !p.gdy) || ((p.gdx || p.gdweight) && !p.gdy)) tensors.refuse();
  if (tensors.answer() != kYes) return refused(tensors);
  Workspace workspace;
#if defined(PYFLOWMAP_CUDA) || defined(PYFLOWMAP_SIMT)
  if (!tensors.runs_on_cpu()) {
    if (!workspace.take("norm_rope_backward", norm_rope_workspace_bytes(p), PyTuple_GET_ITEM(args[0], 0))) {
      return nullptr;
    }
    p.workspace = workspace.data();
  }
#endif
  return as_bool(tensors.run(
      "norm_rope_backward", is_large(p.shape), [&] { return norm_rope_backward_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(norm_rope_backward_cuda(p, device, stream)); }));
}

}  // namespace pyflowmap
