// error_norm.cpp - `error_norm` of Python objects. Contract: error_norm/error_norm.h.
#include "error_norm/error_norm.h"

#include "bindings/bindings.h"
#include "bindings/operands.h"
#include "bindings/row_operands.h"

namespace pyflowmap {
namespace {

// x, y and the terms lie alike in memory, sample by sample.
void read_states(Tensors& tensors, int count, ErrorNorm* p) {
  Layout layout;
  const dlpack::Tensor* x = tensors.at(0);
  if (!x || !find_layout(*x, 1, &layout)) return tensors.refuse();
  p->shape.outer[2] = layout.rows;
  p->shape.columns = layout.columns;
  for (int i = 0; i < count; ++i) {
    const dlpack::Tensor* t = tensors.at(i);
    Operand operand;
    if (!t || !read_operand(*t, layout, &operand)) return tensors.refuse();
    Rows* const to = i == 0 ? &p->x : i == 1 ? &p->y : &p->k[i - 2];
    to->data = operand.data;
    to->dtype = operand.dtype;
    to->stride[2] = operand.row_stride;
    if ((operand.dtype == DType::f64) != (p->x.dtype == DType::f64)) return tensors.refuse();
  }
}

}  // namespace

PyObject* error_norm(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 4) return PyErr_Format(PyExc_TypeError, "error_norm takes 4 arguments, got %zd", nargs);
  Tensors tensors(args[0]);
  if (tensors.answer() != kYes || !PyTuple_CheckExact(args[1])) return as_bool(kNo);
  ErrorNorm p;
  const auto given = static_cast<int>(PyTuple_GET_SIZE(args[0]));  // sums and factor come last
  p.terms = static_cast<int>(PyTuple_GET_SIZE(args[1]));
  if (p.terms < 1 || p.terms > ErrorNorm::kMostTerms || given != p.terms + 4) return as_bool(kNo);
  for (int j = 0; j < p.terms; ++j) p.c[j] = PyFloat_AsDouble(PyTuple_GET_ITEM(args[1], j));
  p.rtol = PyFloat_AsDouble(args[2]);
  p.atol = PyFloat_AsDouble(args[3]);
  if (PyErr_Occurred()) return nullptr;
  read_states(tensors, p.terms + 2, &p);
  if (tensors.answer() == kYes) {
    const bool wide = p.x.dtype == DType::f64;
    if (wide && !tensors.runs_on_cpu()) tensors.refuse();
    p.sums = tensors.dense(given - 2, rows_of(p.shape), wide ? DType::f64 : DType::f32);
    p.factor = static_cast<const double*>(tensors.dense(given - 1, rows_of(p.shape), DType::f64));
    if (!p.sums) tensors.refuse();
  }
  Workspace workspace;
#if defined(PYFLOWMAP_CUDA) || defined(PYFLOWMAP_SIMT)
  if (tensors.answer() == kYes && !tensors.runs_on_cpu()) {
    const size_t bytes = error_norm_workspace_bytes(p);
    if (!workspace.take("error_norm", bytes, PyTuple_GET_ITEM(args[0], 0))) return nullptr;
    p.workspace = workspace.data();
  }
#endif
  return as_bool(tensors.run(
      "error_norm", is_large(p.shape), [&] { return error_norm_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(error_norm_cuda(p, device, stream)); }));
}

}  // namespace pyflowmap
