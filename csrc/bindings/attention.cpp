// attention.cpp - `attention` and `attention_backward` of Python objects. Contract: attention/attention.h.
#include "attention/attention.h"

#include "bindings/bindings.h"
#include "bindings/border.h"
#include "bindings/operands.h"
#include "bindings/rows.h"

namespace pyflowmap {
namespace {

constexpr int64_t kLargeWork =
    1 << 14;  // queries x keys x heads x samples: below it, letting go of the lock costs more

// (q, k, v, dq, dk, dv, mask, lengths, o, do, lse, mu, ...): what both directions share.
enum Position {
  kQ,
  kK,
  kV,
  kDQ,
  kDK,
  kDV,
  kMask,
  kLengths,
  kO,
  kDO,
  kLse,
  kMu,
  kGO,
  kGDO,
  kGQ,
  kGK,
  kGV,
  kGDQ,
  kGDK,
  kGDV
};

void read_mask(Tensors& tensors, AttentionProblem* p) {
  const dlpack::Tensor* t = tensors.at(kMask);
  if (!t) return;
  const int64_t shape[4] = {p->batch, p->heads, p->queries, p->keys};
  p->mask.boolean = t->dtype.code == dlpack::kBool && t->dtype.bits == 8;
  if (t->ndim != 4 || (!p->mask.boolean && !storage_type(*t, &p->mask.dtype))) return tensors.refuse();
  for (int d = 0; d < 4; ++d) {
    if (t->shape[d] != shape[d] && t->shape[d] != 1) return tensors.refuse();
    p->mask.stride[d] = t->shape[d] == 1 ? 0 : t->strides[d];
  }
  p->mask.data = t->data;
}

struct Shapes { int64_t q[4], k[4], v[4], o[4]; };

bool read_problem(Tensors& tensors, PyObject* scale, PyObject* causal, AttentionProblem* p, Shapes* shapes) {
  const dlpack::Tensor *q = tensors.at(kQ), *k = tensors.at(kK), *v = tensors.at(kV);
  if (!q || !k || !v || q->ndim != 4 || k->ndim != 4 || v->ndim != 4) {
    tensors.refuse();
    return false;
  }
  p->batch = q->shape[0];
  p->heads = q->shape[1];
  p->queries = q->shape[2];
  p->head_dim = static_cast<int>(q->shape[3]);
  p->kv_heads = k->shape[1];
  p->keys = k->shape[2];
  p->value_dim = static_cast<int>(v->shape[3]);
  p->scale = PyFloat_AsDouble(scale);
  p->causal = causal == Py_True;
  if (PyErr_Occurred()) return false;
  *shapes = {{p->batch, p->heads, p->queries, p->head_dim},
             {p->batch, p->kv_heads, p->keys, p->head_dim},
             {p->batch, p->kv_heads, p->keys, p->value_dim},
             {p->batch, p->heads, p->queries, p->value_dim}};
  p->q = tensors.rows(kQ, shapes->q);
  p->k = tensors.rows(kK, shapes->k);
  p->v = tensors.rows(kV, shapes->v);
  p->dq = tensors.rows(kDQ, shapes->q);
  p->dk = tensors.rows(kDK, shapes->k);
  p->dv = tensors.rows(kDV, shapes->v);
  p->dtype = p->q.dtype;
  p->lengths = tensors.integers(kLengths, p->batch);
  read_mask(tensors, p);
  if (p->kv_heads < 1 || p->heads % p->kv_heads != 0 || (p->causal && p->queries != p->keys)) tensors.refuse();
  return tensors.answer() == kYes;
}

// Whether all that are given have the dtype of the problem.
void agree(Tensors& tensors, const AttentionProblem& p, std::initializer_list<const Rows*> all) {
  for (const Rows* x : all) {
    if (*x && x->dtype != p.dtype) tensors.refuse();
  }
#if defined(PYFLOWMAP_SIMT)
  if (p.dtype == DType::f64) tensors.refuse();  // the CUDA source has no float64
#endif
}

bool is_large(const AttentionProblem& p) { return p.batch * p.heads * p.queries * p.keys > kLargeWork; }

}  // namespace

PyObject* attention(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 3) return PyErr_Format(PyExc_TypeError, "attention takes 3 arguments, got %zd", nargs);
  Tensors tensors(args[0]);
  AttentionForward p;
  Shapes shapes;
  if (!read_problem(tensors, args[1], args[2], &p, &shapes)) {
    return PyErr_Occurred() ? nullptr : as_bool(tensors.answer() == kYes ? kNo : tensors.answer());
  }
  const DType sums = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t rows = p.batch * p.heads * p.queries;
  p.o = tensors.rows(kO, shapes.o);
  p.d_o = tensors.rows(kDO, shapes.o);
  p.lse = tensors.dense(kLse, rows, sums);
  p.mu = tensors.dense(kMu, rows, sums);
  agree(tensors, p, {&p.k, &p.v, &p.dq, &p.dk, &p.dv, &p.o, &p.d_o});
  if (!p.o) tensors.refuse();
  return as_bool(tensors.run(
      "attention", is_large(p), [&] { return attention_forward_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(attention_forward_cuda(p, device, stream)); }));
}

PyObject* attention_backward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 3) return PyErr_Format(PyExc_TypeError, "attention_backward takes 3 arguments, got %zd", nargs);
  Tensors tensors(args[0]);
  AttentionBackward p;
  Shapes shapes;
  if (!read_problem(tensors, args[1], args[2], &p, &shapes)) {
    return PyErr_Occurred() ? nullptr : as_bool(tensors.answer() == kYes ? kNo : tensors.answer());
  }
  const DType sums = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t rows = p.batch * p.heads * p.queries;
  p.o = tensors.rows(kO, shapes.o);
  p.d_o = tensors.rows(kDO, shapes.o);
  p.lse = tensors.dense(kLse, rows, sums);
  p.mu = tensors.dense(kMu, rows, sums);
  p.go = tensors.rows(kGO, shapes.o);
  p.gdo = tensors.rows(kGDO, shapes.o);
  p.gq = tensors.rows(kGQ, shapes.q);
  p.gk = tensors.rows(kGK, shapes.k);
  p.gv = tensors.rows(kGV, shapes.v);
  p.gdq = tensors.rows(kGDQ, shapes.q);
  p.gdk = tensors.rows(kGDK, shapes.k);
  p.gdv = tensors.rows(kGDV, shapes.v);
  agree(tensors, p,
        {&p.k, &p.v, &p.dq, &p.dk, &p.dv, &p.o, &p.d_o, &p.go, &p.gdo, &p.gq, &p.gk, &p.gv, &p.gdq, &p.gdk, &p.gdv});
  if (!p.o || !p.lse || (!p.go && !p.gdo) || (p.gdo && (!p.d_o || !p.mu))) tensors.refuse();
  if (tensors.answer() != kYes) return as_bool(tensors.answer());
  PyObject* workspace = nullptr;
#if defined(PYFLOWMAP_CUDA) || defined(PYFLOWMAP_SIMT)
  const size_t bytes = tensors.runs_on_cpu() ? 0 : attention_backward_workspace_bytes(p);
  if (bytes > 0) {  // from torch's allocator, so that streams and graphs see it
    workspace =
        PyObject_CallFunction(torch().allocate, "nO", static_cast<Py_ssize_t>(bytes), PyTuple_GET_ITEM(args[0], 0));
    dlpack::Tensor t;
    if (!workspace || !view(workspace, &t)) {
      Py_XDECREF(workspace);
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "attention_backward: torch gave no workspace");
      return nullptr;
    }
    p.workspace = t.data;
  }
#endif
  const Answer answer = tensors.run(
      "attention_backward", is_large(p), [&] { return attention_backward_cpu(p); },
      [&](int device, void* stream) { return CUDA_CALL(attention_backward_cuda(p, device, stream)); });
  Py_XDECREF(workspace);
  return as_bool(answer);
}

}  // namespace pyflowmap
