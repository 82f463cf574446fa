// border.h - the border between Python and C++: what a torch tensor looks like from here, and whether a call may take
// the direct road (plain strided tensors, nothing to record, nobody tracing).
//
// Checks only answer yes or no. A "no" sends the call back to Python, which finds out why and says so in words.
#pragma once
#include <Python.h>

#include "bindings/dlpack.h"

namespace pyflowmap {

// Objects of torch that the border asks. Filled once by `connect` (pyflowmap/ops/border.py).
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* is_grad_enabled = nullptr;
  PyObject* dispatch_modes = nullptr;     // torch._C._len_torch_dispatch_stack
  PyObject* is_tracing = nullptr;         // torch._C._is_tracing
  PyObject* increment_version = nullptr;  // torch._C._increment_version
  PyObject* forward_ad = nullptr;         // the module torch.autograd.forward_ad
  PyObject* allocate = nullptr;           // allocate(bytes, like) -> uint8 tensor on like's device
  PyObject* empty_like = nullptr;
  // What Tensor.requires_grad, ._version, ._base and .is_neg are in C, looked up once: half the price of asking by
  // name. Null where torch defines them in another way; then they are asked by name.
  PyGetSetDef* requires_grad = nullptr;
  PyGetSetDef* version = nullptr;
  PyGetSetDef* base = nullptr;
  PyCFunction is_neg = nullptr;
};

Torch& torch();
void find_descriptors();  // after torch().tensor is known

// Reads a tensor without taking a reference. Returns false (and leaves no Python error) for what has no plain storage:
// another type, a subclass, a wrapper of functorch, sparse, meta. The shape lives as long as the tensor.
bool view(PyObject* object, dlpack::Tensor* out);

// The producer's current stream for the tensor's device (null on the CPU). False with a Python error set on failure.
bool work_stream(PyObject* object, const dlpack::Tensor& tensor, void** stream);

// True where autograd, forward-mode AD, a dispatch mode or the tracer wants to see the call. -1 on a Python error.
int road_is_watched();
int grad_enabled();

// Of one operand: bits that the storage does not show (neg view), or a gradient to record.
// has_counter: the tensor is known to have a version, so it is no inference tensor.
int is_plain(PyObject* tensor, bool grad_is_enabled, bool has_counter);

// Whether a tensor still has the version (an int, or None for one without a counter) that was recorded.
int has_version(PyObject* tensor, PyObject* version);

bool bump_versions(PyObject* outputs_tuple);

}  // namespace pyflowmap
