// border.cpp - see border.h.
#include "bindings/border.h"

namespace pyflowmap {
namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// One entry is enough: a process has one Tensor class (Parameter shares its table).
const dlpack::ExchangeAPI* exchange_of(PyTypeObject* type) {
  static PyTypeObject* known = nullptr;
  static const dlpack::ExchangeAPI* api = nullptr;
  if (type == known) return api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  while (header && header->version.major != dlpack::kMajor) header = header->prev_api;
  auto* found = reinterpret_cast<const dlpack::ExchangeAPI*>(header);
  if (!found || !found->dltensor_from_py_object_no_sync) {
    PyErr_Clear();
    return nullptr;
  }
  known = type;
  api = found;
  return api;
}

int truth_of_call(PyObject* callable) {
  PyObject* answer = PyObject_CallNoArgs(callable);
  if (!answer) return -1;
  const int truth = PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return truth;
}

}  // namespace

Torch& torch() {
  static Torch instance;
  return instance;
}

bool view(PyObject* object, dlpack::Tensor* out) {
  PyTypeObject* type = Py_TYPE(object);
  // Exactly Tensor or Parameter: a FakeTensor, say, would hand out a pointer to nothing and report success.
  if (type != torch().tensor && type != torch().parameter) return false;
  const dlpack::ExchangeAPI* api = exchange_of(torch().tensor);
  if (!api) return false;
  if (api->dltensor_from_py_object_no_sync(object, out) != 0) {
    PyErr_Clear();
    return false;
  }
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  out->byte_offset = 0;
  return out->strides != nullptr || out->ndim == 0;
}

bool work_stream(PyObject*, const dlpack::Tensor& tensor, void** stream) {
  *stream = nullptr;
  if (tensor.device.device_type == dlpack::kCPU) return true;
  return exchange_of(torch().tensor)->current_work_stream(tensor.device.device_type, tensor.device.device_id, stream) ==
         0;
}

int grad_enabled() { return truth_of_call(torch().is_grad_enabled); }

int road_is_watched() {
  static PyObject* level_name = interned("_current_level");
  PyObject* level = PyObject_GetAttr(torch().forward_ad, level_name);
  if (!level) return -1;
  const long depth = PyLong_AsLong(level);
  Py_DECREF(level);
  if (depth == -1 && PyErr_Occurred()) return -1;
  if (depth >= 0) return 1;
  const int modes = truth_of_call(torch().dispatch_modes);
  if (modes != 0) return modes;
  PyObject* state = PyObject_CallNoArgs(torch().tracing_state);
  if (!state) return -1;
  const int traced = state != Py_None;
  Py_DECREF(state);
  return traced;
}

int is_plain(PyObject* tensor, bool grad_is_enabled) {
  static PyObject* requires_grad = interned("requires_grad");
  static PyObject* is_neg = interned("is_neg");
  if (grad_is_enabled) {
    PyObject* answer = PyObject_GetAttr(tensor, requires_grad);
    if (!answer) return -1;
    const bool recorded = answer == Py_True;
    Py_DECREF(answer);
    if (recorded) return 0;
  }
  PyObject* answer = PyObject_CallMethodNoArgs(tensor, is_neg);
  if (!answer) return -1;
  const bool negated = answer == Py_True;
  Py_DECREF(answer);
  return negated ? 0 : 1;
}

bool bump_versions(PyObject* outputs_tuple) {
  PyObject* done = PyObject_CallOneArg(torch().increment_version, outputs_tuple);
  if (!done) return false;
  Py_DECREF(done);
  return true;
}

}  // namespace pyflowmap
