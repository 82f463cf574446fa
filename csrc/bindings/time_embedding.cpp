// time_embedding.cpp - `time_embedding` of Python objects. Contract: time_embedding/time_embedding.h.
#include "time_embedding/time_embedding.h"

#include "bindings/bindings.h"
#include "bindings/operands.h"
#include "bindings/rows.h"

namespace pyflowmap {
namespace {

enum Position { kS, kT, kW, kDS, kDT, kFirst };  // then what the directions have of their own

// A tensor (batch), or with dense columns (batch, columns).
Rows rows_of(Tensors& tensors, int i, int64_t batch, int64_t columns) {
  Rows rows;
  const dlpack::Tensor* t = tensors.at(i);
  if (!t) return rows;
  const bool fits = t->ndim == (columns ? 2 : 1) && storage_type(*t, &rows.dtype) && t->shape[0] == batch &&
                    (!columns || (t->shape[1] == columns && (columns == 1 || t->strides[1] == 1)));
  if (!fits) {
    tensors.refuse();
    return {};
  }
  rows.data = t->data;
  rows.stride[0] = t->strides[0];
  return rows;
}

// `wide`: how many of the `own` operands are (batch, 4 h); the others are times. False with a Python error set.
template <size_t N>
bool read_all(const char* name, PyObject* const* args, Py_ssize_t nargs, Tensors& tensors, TimeEmbedding* p,
              Rows* const (&own)[N], size_t wide) {
  if (nargs != 2) {
    PyErr_Format(PyExc_TypeError, "%s takes 2 arguments, got %zd", name, nargs);
    return false;
  }
  p->span = PyFloat_AsDouble(args[1]) != 0.0;
  if (PyErr_Occurred()) return false;
  const dlpack::Tensor *s = tensors.at(kS), *w = tensors.at(kW);
  if (!s || !w || s->ndim != 1 || w->ndim != 1 || w->shape[0] < 1) {
    tensors.refuse();
    return true;
  }
  p->batch = s->shape[0];
  p->frequencies = w->shape[0];
  p->s = rows_of(tensors, kS, p->batch, 0);
  p->t = rows_of(tensors, kT, p->batch, 0);
  p->ds = rows_of(tensors, kDS, p->batch, 0);
  p->dt = rows_of(tensors, kDT, p->batch, 0);
  const bool is_double = p->s.dtype == DType::f64;
  p->w.data = tensors.dense(kW, p->frequencies, is_double ? DType::f64 : DType::f32);
  for (size_t i = 0; i < N; ++i) {
    *own[i] = rows_of(tensors, kFirst + static_cast<int>(i), p->batch, i < wide ? 4 * p->frequencies : 0);
    if (*own[i] && (own[i]->dtype == DType::f64) != is_double) tensors.refuse();
  }
  for (const Rows* r : {&p->t, &p->ds, &p->dt}) {
    if (*r && (r->dtype == DType::f64) != is_double) tensors.refuse();
  }
  if (!p->s || !p->t || !p->w) tensors.refuse();
  return true;
}

bool is_large(const TimeEmbedding& p) { return p.batch * p.frequencies > 1 << 12; }

PyObject* refused(const Tensors& tensors) { return as_bool(tensors.answer() == kYes ? kNo : tensors.answer()); }

}  // namespace

PyObject* time_embedding(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  TimeEmbeddingForward p;
  Tensors tensors(args[0]);
  Rows* const own[] = {&p.y, &p.dy};
  if (!read_all("time_embedding", args, nargs, tensors, &p, own, 2)) return nullptr;
  if (!p.y) tensors.refuse();
  if (tensors.answer() != kYes) return refused(tensors);
  return as_bool(tensors.run(
      "time_embedding", is_large(p), [&] { return time_embedding_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(time_embedding_cuda(p, device, stream)); }));
}

PyObject* time_embedding_backward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  TimeEmbeddingBackward p;
  Tensors tensors(args[0]);
  Rows* const own[] = {&p.gy, &p.gdy, &p.gs, &p.gt, &p.gds, &p.gdt};
  if (!read_all("time_embedding_backward", args, nargs, tensors, &p, own, 2)) return nullptr;
  if ((!p.gy && !p.gdy) || ((p.gds || p.gdt) && !p.gdy)) tensors.refuse();
  if (tensors.answer() != kYes) return refused(tensors);
  return as_bool(tensors.run(
      "time_embedding_backward", is_large(p), [&] { return time_embedding_backward_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(time_embedding_backward_cuda(p, device, stream)); }));
}

}  // namespace pyflowmap
