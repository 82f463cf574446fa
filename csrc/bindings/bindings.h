// bindings.h - the functions that module.cpp lists, in the calling convention of METH_FASTCALL.
#pragma once
#include <Python.h>

namespace pyflowmap {

PyObject* combine(PyObject* self, PyObject* const* args, Py_ssize_t nargs);

}  // namespace pyflowmap
