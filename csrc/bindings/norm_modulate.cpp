// norm_modulate.cpp - `norm_modulate` of Python objects. Contract: norm_modulate/norm_modulate.h.
#include "norm_modulate/norm_modulate.h"

#include "bindings/bindings.h"
#include "bindings/row_operands.h"

namespace pyflowmap {
namespace {

// (tensors, kind, eps): kind is 0 for layer, 1 for rms. False with a Python error set.
template <class P> bool read_options(const char* name, PyObject* const* args, Py_ssize_t nargs, P* p) {
  if (nargs != 3) {
    PyErr_Format(PyExc_TypeError, "%s takes 3 arguments, got %zd", name, nargs);
    return false;
  }
  p->layer = PyFloat_AsDouble(args[1]) == 0.0;
  p->eps = PyFloat_AsDouble(args[2]);
  return !PyErr_Occurred();
}

}  // namespace

PyObject* norm_modulate(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  NormModulate p;
  if (!read_options("norm_modulate", args, nargs, &p)) return nullptr;
  Tensors tensors(args[0]);
  Rows* const all[] = {&p.x, &p.scale, &p.shift, &p.dx, &p.dscale, &p.dshift, &p.y, &p.dy};
  read_all(tensors, all, &p.shape);
  if (!p.scale || !p.shift || !p.y) tensors.refuse();
  return as_bool(tensors.run(
      "norm_modulate", is_large(p.shape), [&] { return norm_modulate_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(norm_modulate_cuda(p, device, stream)); }));
}

PyObject* norm_modulate_backward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  using P = NormModulateBackward;
  P p;
  if (!read_options("norm_modulate_backward", args, nargs, &p)) return nullptr;
  Tensors tensors(args[0]);
  Rows* const all[] = {&p.x,
                       &p.scale,
                       &p.dx,
                       &p.dscale,
                       &p.gy,
                       &p.gdy,
                       &p.gx,
                       &p.vector[P::kScale],
                       &p.vector[P::kShift],
                       &p.gdx,
                       &p.vector[P::kDScale],
                       &p.vector[P::kDShift]};
  read_all(tensors, all, &p.shape);
  for (const Rows& vector : p.vector) check_sums(tensors, {&vector}, p.shape);
  const bool of_tangents = p.gdx || p.vector[P::kDScale] || p.vector[P::kDShift];
  if (!p.scale || (!p.gy && !p.gdy) || (of_tangents && !p.gdy)) tensors.refuse();
  Workspace workspace;
#if defined(PYFLOWMAP_CUDA) || defined(PYFLOWMAP_SIMT)
  if (tensors.answer() == kYes && !tensors.runs_on_cpu()) {
    const size_t bytes = norm_modulate_workspace_bytes(p);
    if (!workspace.take("norm_modulate_backward", bytes, PyTuple_GET_ITEM(args[0], 0))) return nullptr;
    p.workspace = workspace.data();
  }
#endif
  return as_bool(tensors.run(
      "norm_modulate_backward", is_large(p.shape), [&] { return norm_modulate_backward_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(norm_modulate_backward_cuda(p, device, stream)); }));
}

}  // namespace pyflowmap
