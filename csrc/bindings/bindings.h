// bindings.h - the functions that module.cpp lists, in the calling convention of METH_FASTCALL.
#pragma once
#include <Python.h>

namespace pyflowmap {

PyObject* combine(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// The version of a tensor, None for an inference tensor; TypeError for anything else.
PyObject* version_of(PyObject* self, PyObject* object);

// Lazy combinations (a tuple of them) into `out`, a tensor or one for each, if their operands are still the versions
// that they recorded.
PyObject* update(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// a + factor * b of lazy combinations, as the tuples (operands, coefficients, versions), or None.
PyObject* sum_of(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// (tensors, scale, causal) -> bool; the tensors by position: attention.cpp. Contract: attention/attention.h.
PyObject* attention_forward(PyObject* self, PyObject* const* args, Py_ssize_t nargs);
PyObject* attention_backward(PyObject* self, PyObject* const* args, Py_ssize_t nargs);


// (tensors, kind) -> bool; the tensors by position: activation.cpp. Contract: activation/activation.h.
PyObject* activation(PyObject* self, PyObject* const* args, Py_ssize_t nargs);
PyObject* activation_backward(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// (x, dx or None, kind) -> y or (y, dy), made here; None where Python must look at the call.
PyObject* activate(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// (tensors) -> bool; the tensors by position: module.cpp. Contract: gated_residual/gated_residual.h.
PyObject* gated_residual(PyObject* self, PyObject* const* args, Py_ssize_t nargs);
PyObject* gated_residual_backward(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// (tensors, kind, eps) -> bool. Contract: norm_modulate/norm_modulate.h.
PyObject* norm_modulate(PyObject* self, PyObject* const* args, Py_ssize_t nargs);
PyObject* norm_modulate_backward(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// ((x, dx, weight, bias, y, dy),) -> bool. Contract: dual_linear/dual_linear.h.
PyObject* dual_linear(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// (tensors, kind) -> bool; the tensors by position: activation.cpp. Contract: activation/activation.h.
PyObject* activation(PyObject* self, PyObject* const* args, Py_ssize_t nargs);
PyObject* activation_backward(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// (x, dx or None, kind) -> y or (y, dy), made here; None where Python must look at the call.
PyObject* activate(PyObject* self, PyObject* const* args, Py_ssize_t nargs);


// (tensors, eps) -> bool. Contract: norm_rope/norm_rope.h.
PyObject* norm_rope(PyObject* self, PyObject* const* args, Py_ssize_t nargs);
PyObject* norm_rope_backward(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// (tensors, span) -> bool. Contract: time_embedding/time_embedding.h.
PyObject* time_embedding(PyObject* self, PyObject* const* args, Py_ssize_t nargs);
PyObject* time_embedding_backward(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

}  // namespace pyflowmap
