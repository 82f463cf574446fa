// activation.cpp - `activation`, `activation_backward` and, for small tensors, `activate` of Python objects. Contract:
// activation/activation.h.
#include "activation/activation.h"

#include "bindings/bindings.h"
#include "bindings/border.h"
#include "bindings/broadcast.h"
#include "bindings/operands.h"
#include "bindings/rows.h"

namespace pyflowmap {
namespace {

constexpr int64_t kLargeWork = 1 << 14;  // elements: below it, letting go of the lock costs more

// All in one dense order: elements correspond by their place in memory, and make one long row. A result, which torch has
// just made, overlaps nothing; the sum of its strides then says whether it leaves gaps.
bool is_one_row(Tensors& tensors, int result, const int* given, int count, int64_t* elements) {
  const dlpack::Tensor* like = tensors.at(result);
  int64_t numbers = 1, last = 0;
  for (int d = 0; d < like->ndim; ++d) {
    numbers *= like->shape[d];
    last += (like->shape[d] - 1) * like->strides[d];
  }
  if (numbers > 0 && last != numbers - 1) return false;
  for (int n = 0; n < count; ++n) {
    const dlpack::Tensor* t = tensors.at(given[n]);
    if (!t || t->ndim != like->ndim) return false;
    for (int d = 0; d < like->ndim; ++d) {
      if (t->shape[d] != like->shape[d]) return false;
      if (t->strides[d] != like->strides[d] && t->shape[d] > 1) return false;
    }
  }
  *elements = numbers;
  return true;
}

bool read_kind(PyObject* object, ActivationKind* kind) {
  const long number = PyLong_AsLong(object);
  if (number < 0 || number >= kActivationKinds) return false;
  *kind = static_cast<ActivationKind>(number);
  return true;
}

// The tensors of a call by position, into the Rows that stand there. `result` is one that must be given.
Answer run(PyObject* tuple, PyObject* kind, Activation* p, Rows* const* places, int count, int result) {
  Tensors tensors(tuple);
  int given[16], found = 0;
  for (int i = 0; i < count; ++i) {
    if (tensors.has(i)) given[found++] = i;
  }
  if (tensors.answer() != kYes || !tensors.at(result) || !read_kind(kind, &p->kind)) {
    if (PyErr_Occurred()) return kError;
    return tensors.answer() == kError ? kError : kNo;
  }
  if (is_one_row(tensors, result, given, found, &p->shape.columns)) {
    for (int n = 0; n < found; ++n) {
      const dlpack::Tensor* t = tensors.at(given[n]);
      if (!storage_type(*t, &places[given[n]]->dtype)) tensors.refuse();
      places[given[n]]->data = t->data;
    }
  } else {
    Broadcast broadcast(&tensors, result);
    for (int n = 0; n < found; ++n) broadcast.add(given[n], places[given[n]]);
    broadcast.finish(&p->shape);
  }
  bool wide = true, any_wide = false;
  for (int n = 0; n < found; ++n) {
    const bool is_wide = places[given[n]]->dtype == DType::f64;
    wide = wide && is_wide;
    any_wide = any_wide || is_wide;
  }
  if (any_wide && (!wide || !tensors.runs_on_cpu())) tensors.refuse();
  const int64_t elements = p->shape.outer[0] * p->shape.outer[1] * p->shape.outer[2] * p->shape.columns;
  return tensors.run(
      "activation", elements > kLargeWork, [&] { return activation_cpu(*p); },
      [&](int device, void* stream) { return CUDA_CALL(activation_cuda(*p, device, stream)); });
}

}  // namespace

PyObject* activation(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2) return PyErr_Format(PyExc_TypeError, "activation takes 2 arguments, got %zd", nargs);
  Activation p;
  Rows* const places[] = {&p.a, &p.b, &p.da, &p.db, &p.y, &p.dy};
  return as_bool(run(args[0], args[1], &p, places, 6, 4));
}

PyObject* activation_backward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2) return PyErr_Format(PyExc_TypeError, "activation_backward takes 2 arguments, got %zd", nargs);
  Activation p;
  p.backward = true;
  Rows* const places[] = {&p.a, &p.b, &p.da, &p.db, &p.gy, &p.gdy, &p.ga, &p.gb, &p.gda, &p.gdb};
  PyObject* tuple = args[0];
  int result = -1;
  for (int i = 6; PyTuple_CheckExact(tuple) && i < PyTuple_GET_SIZE(tuple) && i < 10; ++i) {
    if (PyTuple_GET_ITEM(tuple, i) != Py_None) result = i;
  }
  if (result < 0) return as_bool(kNo);
  return as_bool(run(tuple, args[1], &p, places, 10, result));
}

// The road without Python: results are made here, where nobody records, traces or casts. None where somebody might.
PyObject* activate(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 3) return PyErr_Format(PyExc_TypeError, "activate takes 3 arguments, got %zd", nargs);
  PyObject *x = args[0], *dx = args[1];
  dlpack::Tensor t, dt;
  if (!torch().tensor || !view(x, &t) || (dx != Py_None && !view(dx, &dt))) Py_RETURN_NONE;
  DType dtype, d_dtype;
  if (!storage_type(t, &dtype)) Py_RETURN_NONE;
  if (dx != Py_None) {
    bool alike = storage_type(dt, &d_dtype) && d_dtype == dtype && dt.ndim == t.ndim && same_device(t, dt);
    for (int d = 0; alike && d < t.ndim; ++d) alike = t.shape[d] == dt.shape[d];
    if (!alike) Py_RETURN_NONE;
  }
  const int grad = grad_enabled();
  const int watched = grad < 0 ? -1 : road_is_watched();
  int plain = watched < 0 ? -1 : watched ? 0 : is_plain(x, grad == 1, false);
  if (plain == 1 && dx != Py_None) plain = is_plain(dx, grad == 1, false);
  if (plain < 0) return nullptr;
  if (plain == 0) Py_RETURN_NONE;

  PyObject* results[2] = {PyObject_CallOneArg(torch().empty_like, x), nullptr};
  if (results[0] && dx != Py_None) results[1] = PyObject_CallOneArg(torch().empty_like, x);
  PyObject* tuple = nullptr;
  if (results[0] && (dx == Py_None || results[1]))
    tuple = PyTuple_Pack(6, x, Py_None, dx, Py_None, results[0], results[1] ? results[1] : Py_None);
  Answer answer = kError;
  if (tuple) {
    Activation p;
    Rows* const places[] = {&p.a, &p.b, &p.da, &p.db, &p.y, &p.dy};
    answer = run(tuple, args[2], &p, places, 6, 4);
    Py_DECREF(tuple);
  }
  PyObject* found = nullptr;
  if (answer == kYes) found = results[1] ? PyTuple_Pack(2, results[0], results[1]) : Py_NewRef(results[0]);
  else if (answer == kNo) found = Py_NewRef(Py_None);
  Py_XDECREF(results[0]);
  Py_XDECREF(results[1]);
  return found;
}

}  // namespace pyflowmap
