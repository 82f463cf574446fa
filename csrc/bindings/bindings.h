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

// The sum of factor * combination, as the tuples (operands, coefficients, versions), or None.
PyObject* sum_of(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

// The kernels of whole tensors: (tensors, constants ...) -> bool, the tensors by position (module.cpp) and None where one
// is not given; False where they do not fit. Contracts: <kernel>/<kernel>.h.
#define KERNEL(name) PyObject* name(PyObject* self, PyObject* const* args, Py_ssize_t nargs)
KERNEL(activation);
KERNEL(activation_backward);
KERNEL(attention);
KERNEL(attention_backward);
KERNEL(dual_linear);
KERNEL(error_norm);
KERNEL(gated_residual);
KERNEL(gated_residual_backward);
KERNEL(norm_modulate);
KERNEL(norm_modulate_backward);
KERNEL(norm_rope);
KERNEL(norm_rope_backward);
KERNEL(time_embedding);
KERNEL(time_embedding_backward);

// (x, dx or None, kind) -> y or (y, dy), made here; None where Python must look at the call.
KERNEL(activate);
#undef KERNEL

}  // namespace pyflowmap
