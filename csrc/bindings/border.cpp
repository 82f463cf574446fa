// border.cpp - see border.h.
#include "bindings/border.h"

#include "bindings/bindings.h"

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

PyObject* call_no_arguments(PyObject* callable) {
  if (PyCFunction_CheckExact(callable) && PyCFunction_GET_FLAGS(callable) == METH_NOARGS) {
    return PyCFunction_GET_FUNCTION(callable)(PyCFunction_GET_SELF(callable), nullptr);
  }
  return PyObject_CallNoArgs(callable);
}

PyObject* attribute(PyObject* tensor, PyGetSetDef* known, PyObject* name) {
  return known ? known->get(tensor, known->closure) : PyObject_GetAttr(tensor, name);
}

PyGetSetDef* getter(const char* name) {
  PyObject* found = PyObject_GetAttrString(reinterpret_cast<PyObject*>(torch().tensor), name);
  PyGetSetDef* definition = nullptr;
  if (found && Py_TYPE(found) == &PyGetSetDescr_Type)
    definition = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
  if (!found) PyErr_Clear();
  return definition;  // the reference to `found` is kept: the definition lives as long as the process
}

int truth_of_call(PyObject* callable) {
  PyObject* answer = call_no_arguments(callable);
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

void find_descriptors() {
  torch().requires_grad = getter("requires_grad");
  torch().version = getter("_version");
  torch().base = getter("_base");
  PyObject* found = PyObject_GetAttrString(reinterpret_cast<PyObject*>(torch().tensor), "is_neg");
  if (!found) PyErr_Clear();
  if (found && Py_TYPE(found) == &PyMethodDescr_Type) {
    PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(found)->d_method;
    if (method->ml_flags == METH_NOARGS) torch().is_neg = method->ml_meth;
  }
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
  PyObject* level = PyDict_GetItemWithError(PyModule_GetDict(torch().forward_ad), level_name);
  if (!level) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "this torch has no forward_ad._current_level");
    return -1;
  }
  const long depth = PyLong_AsLong(level);
  if (depth == -1 && PyErr_Occurred()) return -1;
  if (depth >= 0) return 1;
  const int modes = truth_of_call(torch().dispatch_modes);
  if (modes != 0) return modes;
  return truth_of_call(torch().is_tracing);
}

int is_plain(PyObject* tensor, bool grad_is_enabled, bool has_counter) {
  static PyObject* requires_grad = interned("requires_grad");
  static PyObject* is_neg = interned("is_neg");
  if (grad_is_enabled) {
    PyObject* answer = attribute(tensor, torch().requires_grad, requires_grad);
    if (!answer) return -1;
    const bool recorded = answer == Py_True;
    Py_DECREF(answer);
    if (recorded) return 0;
  }
  // A negative view is a view and has a base, which is cheaper to ask for. Inference tensors hide theirs; they are known
  // by having no version.
  if (has_counter && torch().base) {
    PyObject* base = torch().base->get(tensor, torch().base->closure);
    if (!base) return -1;
    const bool is_view = base != Py_None;
    Py_DECREF(base);
    if (!is_view) return 1;
  }
  PyObject* answer = torch().is_neg ? torch().is_neg(tensor, nullptr) : PyObject_CallMethodNoArgs(tensor, is_neg);
  if (!answer) return -1;
  const bool negated = answer == Py_True;
  Py_DECREF(answer);
  return negated ? 0 : 1;
}

PyObject* version_of(PyObject*, PyObject* object) {
  static PyObject* name = interned("_version");
  const bool exact = Py_TYPE(object) == torch().tensor || Py_TYPE(object) == torch().parameter;
  if (!exact && PyObject_IsInstance(object, reinterpret_cast<PyObject*>(torch().tensor)) != 1) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "lazy takes a tensor, got %s", Py_TYPE(object)->tp_name);
    return nullptr;
  }
  PyObject* version = exact ? attribute(object, torch().version, name) : PyObject_GetAttr(object, name);
  if (version) return version;
  if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return nullptr;
  PyErr_Clear();  // an inference tensor has no counter
  Py_RETURN_NONE;
}

int has_version(PyObject* tensor, PyObject* version) {
  static PyObject* name = interned("_version");
  if (Py_TYPE(tensor) != torch().tensor && Py_TYPE(tensor) != torch().parameter) return 0;
  if (version == Py_None) return 1;
  PyObject* now = attribute(tensor, torch().version, name);
  if (!now) return -1;
  const int same = PyLong_AsLong(now) == PyLong_AsLong(version);
  Py_DECREF(now);
  return PyErr_Occurred() ? -1 : same;
}

bool bump_versions(PyObject* outputs_tuple) {
  PyObject* written = outputs_tuple;
  Py_INCREF(written);
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(outputs_tuple); ++k) {
    if (PyTuple_GET_ITEM(outputs_tuple, k) != Py_None) continue;  // torch wants tensors only
    PyObject* list = PySequence_List(outputs_tuple);
    for (Py_ssize_t i = list ? PyList_GET_SIZE(list) : 0; i-- > 0;) {
      if (PyList_GET_ITEM(list, i) == Py_None && PyList_SetSlice(list, i, i + 1, nullptr) != 0) Py_CLEAR(list);
      if (!list) break;
    }
    Py_DECREF(written);
    written = list;
    if (!written) return false;
    break;
  }
  PyObject* done = PyObject_CallOneArg(torch().increment_version, written);
  Py_DECREF(written);
  if (!done) return false;
  Py_DECREF(done);
  return true;
}

}  // namespace pyflowmap
