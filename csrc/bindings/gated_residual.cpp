// gated_residual.cpp - `gated_residual` of Python objects. Contract: gated_residual/gated_residual.h.
#include "gated_residual/gated_residual.h"

#include "bindings/bindings.h"
#include "bindings/row_operands.h"

namespace pyflowmap {

PyObject* gated_residual(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 1) return PyErr_Format(PyExc_TypeError, "gated_residual takes 1 argument, got %zd", nargs);
  Tensors tensors(args[0]);
  GatedResidual p;
  Rows* const all[] = {&p.x, &p.gate, &p.h, &p.dx, &p.dgate, &p.dh, &p.y, &p.dy};
  read_all(tensors, all, &p.shape);
  if (!p.gate || !p.h || !p.y) tensors.refuse();
  return as_bool(tensors.run(
      "gated_residual", is_large(p.shape), [&] { return gated_residual_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(gated_residual_cuda(p, device, stream)); }));
}

PyObject* gated_residual_backward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 1) return PyErr_Format(PyExc_TypeError, "gated_residual_backward takes 1 argument, got %zd", nargs);
  Tensors tensors(args[0]);
  GatedResidualBackward p;
  Rows* const all[] = {&p.h, &p.gate, &p.dgate, &p.dh, &p.gy, &p.gdy, &p.gh, &p.ggate, &p.gdh, &p.gdgate};
  read_all(tensors, all, &p.shape);
  check_sums(tensors, {&p.ggate, &p.gdgate}, p.shape);
  if (!p.gate || (!p.gy && !p.gdy) || ((p.gdh || p.gdgate) && !p.gdy)) tensors.refuse();
  Workspace workspace;
#if defined(PYFLOWMAP_CUDA) || defined(PYFLOWMAP_SIMT)
  if (tensors.answer() == kYes && !tensors.runs_on_cpu()) {
    const size_t bytes = gated_residual_workspace_bytes(p);
    if (!workspace.take("gated_residual_backward", bytes, PyTuple_GET_ITEM(args[0], 0))) return nullptr;
    p.workspace = workspace.data();
  }
#endif
  return as_bool(tensors.run(
      "gated_residual_backward", is_large(p.shape), [&] { return gated_residual_backward_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(gated_residual_backward_cuda(p, device, stream)); }));
}

}  // namespace pyflowmap
