// workspace.h - memory that a kernel needs during a call, from torch's allocator, so that streams and graphs see it.
#pragma once
#include "bindings/border.h"
#include "bindings/rows.h"

namespace pyflowmap {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { Py_XDECREF(tensor_); }

  // On the device of `like`. False with a Python error set.
  bool take(const char* name, size_t bytes, PyObject* like) {
    if (bytes == 0) return true;
    tensor_ = PyObject_CallFunction(torch().allocate, "nO", static_cast<Py_ssize_t>(bytes), like);
    dlpack::Tensor t;
    if (tensor_ && view(tensor_, &t)) {
      data_ = t.data;
      return true;
    }
    if (!PyErr_Occurred()) PyErr_Format(PyExc_RuntimeError, "%s: torch gave no workspace", name);
    return false;
  }
  void* data() const { return data_; }

 private:
  PyObject* tensor_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace pyflowmap
