// combine.cpp (bindings) - reads one call of `combine` from Python objects into CombineParams and runs it.
//
// Every check of the contract that does not need words is made here. A call that does not fit answers False and has
// touched nothing: pyflowmap/ops/combine.py then finds the reason, copies an operand, or takes the operator road.
#include "combine/combine.h"

#include "bindings/bindings.h"
#include "bindings/border.h"
#include "bindings/operands.h"
#include "bindings/perform.h"

namespace pyflowmap {
namespace {

// ---- coefficients -------------------------------------------------------------------------------------------------

struct Call {
  CombineParams p;
  Layout layout;
  bool trusted = false, grad = false, have_counters = false;
  bool has_vectors = false;
  bool wide = false;  // arithmetic in f64
};

Answer plain(const Call& call, PyObject* tensor, bool has_counter = false) {
  if (call.trusted) return kYes;
  const int answer = is_plain(tensor, call.grad, has_counter);
  return answer < 0 ? kError : answer ? kYes : kNo;
}

// One number per row: shape equal to the leading dimensions of the operands, or 0-d (shared).
Answer read_vector(Call& call, PyObject* object, Coefficient* c) {
  dlpack::Tensor t;
  DType dtype;
  if (!view(object, &t) || !storage_type(t, &dtype) || !same_device(t, call.layout.like)) return kNo;
  if (dtype != DType::f32 && dtype != DType::f64) return kNo;
  c->vector = t.data;
  c->vector_is_double = dtype == DType::f64;
  c->stride = 0;
  call.has_vectors = true;
  if (t.ndim == 0) return plain(call, object);
  if (t.ndim != call.layout.leading) return kNo;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] != call.layout.like.shape[d]) return kNo;
  }
  if (!even_stride(t.shape, t.strides, t.ndim, &c->stride)) return kNo;
  return plain(call, object);
}

// A number, a tensor of the leading dimensions, or the pair (number, tensor).
Answer read_coefficient(Call& call, PyObject* object, Coefficient* c) {
  if (PyFloat_CheckExact(object)) {
    c->scalar = PyFloat_AS_DOUBLE(object);
    return kYes;
  }
  if (PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2) {
    PyObject* number = PyTuple_GET_ITEM(object, 0);
    if (!PyFloat_Check(number) && !PyLong_Check(number)) return kNo;
    c->scalar = PyFloat_AsDouble(number);
    if (c->scalar == -1.0 && PyErr_Occurred()) return kError;
    PyObject* vector = PyTuple_GET_ITEM(object, 1);
    return vector == Py_None ? kYes : read_vector(call, vector, c);
  }
  if (PyFloat_Check(object) || PyLong_Check(object)) {
    c->scalar = PyFloat_AsDouble(object);
    return c->scalar == -1.0 && PyErr_Occurred() ? kError : kYes;
  }
  c->scalar = 1.0;
  return read_vector(call, object, c);
}

Answer read_matrix(Call& call, PyObject* matrix, Coefficient (*to)[kMaxTerms]) {
  if (!PyTuple_CheckExact(matrix) || PyTuple_GET_SIZE(matrix) != call.p.outputs) return kNo;
  const int terms = call.p.inputs + (call.p.noise.present ? 1 : 0);
  for (int k = 0; k < call.p.outputs; ++k) {
    PyObject* row = PyTuple_GET_ITEM(matrix, k);
    if (!PyTuple_CheckExact(row) || PyTuple_GET_SIZE(row) != terms) return kNo;
    for (int j = 0; j < kMaxTerms; ++j) to[k][j] = Coefficient{};
    for (int j = 0; j < terms; ++j) {
      const Answer answer =
          read_coefficient(call, PyTuple_GET_ITEM(row, j), &to[k][j < call.p.inputs ? j : kMaxInputs]);
      if (answer != kYes) return answer;
    }
  }
  return kYes;
}

// ---- noise, mask, clamp, reductions -------------------------------------------------------------------------------

Answer read_int64(Call& call, PyObject* object, int64_t count, const int64_t** to) {
  *to = nullptr;
  if (object == Py_None) return kYes;
  dlpack::Tensor t;
  if (!view(object, &t) || !is_int64(t) || !same_device(t, call.layout.like) || t.ndim > 1) return kNo;
  if (t.ndim == 1 && (t.shape[0] != count || (count > 1 && t.strides[0] != 1))) return kNo;
  if (t.ndim == 0 && count != 1) return kNo;
  *to = static_cast<const int64_t*>(t.data);
  return kYes;
}

// (seed, seed tensor | None, stream, stream tensor | None, sample ids | None, dimensions of a sample)
Answer read_noise(Call& call, PyObject* tuple) {
  Noise& noise = call.p.noise;
  if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 6) return kNo;
  noise.seed = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(tuple, 0));
  noise.stream = static_cast<uint32_t>(PyLong_AsUnsignedLongMask(PyTuple_GET_ITEM(tuple, 2)));
  const long sample_dims = PyLong_AsLong(PyTuple_GET_ITEM(tuple, 5));
  if (PyErr_Occurred()) return kError;
  const Layout& layout = call.layout;
  if (sample_dims < 0 || sample_dims > layout.leading) return kNo;
  int64_t samples = 1, per_sample = 1;
  for (int d = 0; d < layout.leading; ++d) (d < sample_dims ? samples : per_sample) *= layout.like.shape[d];
  noise.rows_per_sample = per_sample > 0 ? per_sample : 1;
  if (layout.columns > 0 && noise.rows_per_sample > (int64_t{1} << 34) / layout.columns) return kNo;
  Answer answer = read_int64(call, PyTuple_GET_ITEM(tuple, 1), 1, &noise.seed_data);
  if (answer == kYes) answer = read_int64(call, PyTuple_GET_ITEM(tuple, 3), 1, &noise.stream_data);
  if (answer == kYes) answer = read_int64(call, PyTuple_GET_ITEM(tuple, 4), samples, &noise.sample_ids);
  if (answer != kYes) return answer;
  int64_t logical[64];
  int64_t stride = 1;
  for (int d = layout.like.ndim - 1; d >= layout.leading; --d) {
    logical[d] = stride;
    stride *= layout.like.shape[d];
  }
  return make_map(layout, logical, &noise.logical) ? kYes : kNo;
}

// (mask, coefficients B): the mask has the operands' dimensions, each of the same size or 1.
Answer read_mask(Call& call, PyObject* tuple) {
  if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 2) return kNo;
  const Layout& layout = call.layout;
  dlpack::Tensor t;
  DType dtype;
  if (!view(PyTuple_GET_ITEM(tuple, 0), &t) || !storage_type(t, &dtype) || !same_device(t, layout.like)) return kNo;
  if (t.ndim != layout.like.ndim || dtype != (call.wide ? DType::f64 : DType::f32)) return kNo;
  int64_t strides[64];
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] != layout.like.shape[d] && t.shape[d] != 1) return kNo;
    strides[d] = t.shape[d] == 1 ? 0 : t.strides[d];
  }
  Mask& mask = call.p.mask;
  mask.data = t.data;
  if (!even_stride(layout.like.shape, strides, layout.leading, &mask.row_stride)) return kNo;
  if (!make_map(layout, strides, &mask.index)) return kNo;
  const Answer answer = plain(call, PyTuple_GET_ITEM(tuple, 0));
  return answer == kYes ? read_matrix(call, PyTuple_GET_ITEM(tuple, 1), call.p.b) : answer;
}

Answer read_clamp(Call& call, PyObject* tuple) {
  if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != call.p.outputs) return kNo;
  for (int k = 0; k < call.p.outputs; ++k) {
    PyObject* bounds = PyTuple_GET_ITEM(tuple, k);
    if (bounds == Py_None) continue;
    if (!PyTuple_CheckExact(bounds) || PyTuple_GET_SIZE(bounds) != 2) return kNo;
    call.p.clamp[k] = true;
    call.p.low[k] = PyFloat_AsDouble(PyTuple_GET_ITEM(bounds, 0));
    call.p.high[k] = PyFloat_AsDouble(PyTuple_GET_ITEM(bounds, 1));
    if (PyErr_Occurred()) return kError;
  }
  return kYes;
}

Answer read_reduction(Call& call, PyObject* object, int64_t numbers_per_row, void** to) {
  if (object == Py_None) return kYes;
  dlpack::Tensor t;
  DType dtype;
  if (!view(object, &t) || !storage_type(t, &dtype) || !same_device(t, call.layout.like)) return kNo;
  int64_t numbers = 1, expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != expected) return kNo;
    expected *= t.shape[d];
    numbers *= t.shape[d];
  }
  if (dtype != (call.wide ? DType::f64 : DType::f32) || numbers != call.layout.rows * numbers_per_row) return kNo;
  *to = t.data;
  return kYes;
}

// ---- the call -----------------------------------------------------------------------------------------------------

Answer read_call(PyObject* const* args, Py_ssize_t nargs, Call& call) {
  PyObject *inputs = args[0], *outputs = args[2];
  CombineParams& p = call.p;
  p.inputs = static_cast<int>(PyTuple_GET_SIZE(inputs));
  p.outputs = static_cast<int>(PyTuple_GET_SIZE(outputs));
  const auto option = [&](int i) { return i < nargs && args[i] != Py_False ? args[i] : Py_None; };

  dlpack::Tensor tensors[kMaxInputs + kMaxOutputs];
  PyObject* objects[kMaxInputs + kMaxOutputs];
  int count = 0;
  for (int i = 0; i < p.inputs + p.outputs; ++i) {
    objects[i] = i < p.inputs ? PyTuple_GET_ITEM(inputs, i) : PyTuple_GET_ITEM(outputs, i - p.inputs);
    if (i >= p.inputs && objects[i] == Py_None) continue;
    if (!view(objects[i], &tensors[i])) return kNo;
    const Answer answer = plain(call, objects[i], call.have_counters && i < p.inputs);
    if (answer != kYes) return answer;
    ++count;
  }
  dlpack::Tensor like;
  int reference = 0;
  while (reference < p.inputs + p.outputs && objects[reference] == Py_None) ++reference;
  if (reference < p.inputs + p.outputs) like = tensors[reference];
  else if (!view(option(11), &like)) return kNo;

  const int leading = static_cast<int>(PyLong_AsLong(args[3]));
  if (PyErr_Occurred()) return kError;
  if (leading < 0) return kNo;
  p.noise.present = option(5) != Py_None;
  const bool rows_matter =
      p.noise.present || option(6) != Py_None || option(8) != Py_None || option(9) != Py_None || option(10) != Py_None;

  // Where no number depends on the row, any layout that all operands share will do.
  for (int attempt = leading <= like.ndim ? leading : 0;; attempt = 0) {
    bool good = find_layout(like, attempt, &call.layout);
    for (int i = 0; good && i < p.inputs + p.outputs; ++i) {
      if (objects[i] == Py_None) continue;
      good = read_operand(tensors[i], call.layout, i < p.inputs ? &p.x[i] : &p.y[i - p.inputs]);
    }
    if (good) break;
    if (attempt == 0 || rows_matter) return kNo;
  }
  if (rows_matter && call.layout.leading != leading) return kNo;
  p.rows = call.layout.rows;
  p.columns = call.layout.columns;

  int wide = 0;
  for (int j = 0; j < p.inputs; ++j) wide += p.x[j].dtype == DType::f64;
  for (int k = 0; k < p.outputs; ++k) wide += objects[p.inputs + k] != Py_None && p.y[k].dtype == DType::f64;
  if (wide != 0 && wide != count) return kNo;
  for (int i = 8; count == 0 && i <= 10; ++i) {  // noise that is reduced and not stored: the result says in which type
    dlpack::Tensor sum;
    DType dtype;
    if (option(i) == Py_None) continue;
    if (!view(option(i), &sum) || !storage_type(sum, &dtype)) return kNo;
    wide = dtype == DType::f64;
  }
  call.wide = wide != 0;
  for (int k = 0; k < p.outputs; ++k) {
    if (objects[p.inputs + k] == Py_None && call.wide) p.y[k].dtype = DType::f64;
  }
#if defined(PYFLOWMAP_SIMT)
  if (wide != 0) return kNo;  // the CUDA source has no float64
#endif
  if (wide != 0 && like.device.device_type != dlpack::kCPU) return kNo;

  Answer answer = kYes;
  if (p.noise.present) answer = read_noise(call, option(5));
  if (answer == kYes) answer = read_matrix(call, args[1], p.a);
  if (answer == kYes && option(6) != Py_None) answer = read_mask(call, option(6));
  if (answer == kYes && option(7) != Py_None) answer = read_clamp(call, option(7));
  const int64_t K = p.outputs, terms = p.inputs + (p.noise.present ? 1 : 0);
  if (answer == kYes) answer = read_reduction(call, option(8), K * K, &p.gram);
  if (answer == kYes) answer = read_reduction(call, option(9), K * terms, &p.cross);
  if (answer == kYes) answer = read_reduction(call, option(10), K, &p.sums);
  if (answer != kYes) return answer;
  if (call.has_vectors && call.layout.leading != leading) return kNo;
  return aliasing_is_fine(p.x, p.inputs, p.y, p.outputs, call.layout) ? kYes : kNo;
}

Status run(const Call& call, void* stream) {
  (void)stream;
#if defined(PYFLOWMAP_SIMT)
  return combine_cuda(call.p, 0, nullptr);
#else
  if (call.layout.like.device.device_type == dlpack::kCPU) return combine_cpu(call.p);
#if defined(PYFLOWMAP_CUDA)
  return combine_cuda(call.p, call.layout.like.device.device_id, stream);
#else
  return {1, "this build has no CUDA back end"};
#endif
#endif
}

// Scratch of the CUDA kernels comes from torch's allocator, so that streams and graphs see it.
PyObject* workspace_for(Call& call, PyObject* like) {
#if defined(PYFLOWMAP_CUDA) || defined(PYFLOWMAP_SIMT)
#if !defined(PYFLOWMAP_SIMT)
  if (call.layout.like.device.device_type == dlpack::kCPU) Py_RETURN_NONE;
#endif
  const size_t bytes = combine_workspace_bytes(call.p);
  if (bytes == 0) Py_RETURN_NONE;
  PyObject* tensor = PyObject_CallFunction(torch().allocate, "nO", static_cast<Py_ssize_t>(bytes), like);
  dlpack::Tensor t;
  if (tensor && view(tensor, &t)) {
    call.p.workspace = t.data;
    return tensor;
  }
  Py_XDECREF(tensor);
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "combine: torch gave no workspace");
  return nullptr;
#else
  (void)call;
  (void)like;
  Py_RETURN_NONE;
#endif
}

}  // namespace

Answer perform(PyObject* const* args, Py_ssize_t nargs, bool trusted, bool have_counters) {
  if (!PyTuple_CheckExact(args[0]) || !PyTuple_CheckExact(args[2])) return kNo;
  const Py_ssize_t outputs = PyTuple_GET_SIZE(args[2]);
  if (PyTuple_GET_SIZE(args[0]) > kMaxInputs || outputs > kMaxOutputs || outputs == 0) return kNo;
  Call call;
  call.trusted = trusted;
  call.have_counters = have_counters;
  if (!trusted) {
    const int watched = road_is_watched();
    if (watched != 0) return watched < 0 ? kError : kNo;
    const int grad = grad_enabled();
    if (grad < 0) return kError;
    call.grad = grad != 0;
  }
  const Answer answer = read_call(args, nargs, call);
  if (answer != kYes) return answer;
#if !defined(PYFLOWMAP_CUDA)
  if (call.layout.like.device.device_type != dlpack::kCPU) return kNo;
#endif

  flatten_rows(&call.p);
  PyObject* like = call.p.inputs ? PyTuple_GET_ITEM(args[0], 0) : nargs > 11 ? args[11] : PyTuple_GET_ITEM(args[2], 0);
  void* stream = nullptr;
  if (!work_stream(like, call.layout.like, &stream)) return kError;
  PyObject* workspace = workspace_for(call, like);
  if (!workspace) return kError;

  Status status;
  // Letting go of the lock costs more than a small update does.
  if (call.p.rows * call.p.columns > 8192) {
    Py_BEGIN_ALLOW_THREADS;
    status = run(call, stream);
    Py_END_ALLOW_THREADS;
  } else {
    status = run(call, stream);
  }
  Py_DECREF(workspace);
  if (!status.ok()) {
    PyErr_Format(PyExc_RuntimeError, "combine failed: %s (code %d)", status.message, status.code);
    return kError;
  }
  bool stored = false;
  for (int k = 0; k < call.p.outputs; ++k) stored |= call.p.y[k].data != nullptr;
  return trusted || !stored || bump_versions(args[2]) ? kYes : kError;
}

PyObject* as_bool(Answer answer) { return answer == kError ? nullptr : PyBool_FromLong(answer == kYes); }

PyObject* combine(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs < 5 || nargs > 14) {
    PyErr_Format(PyExc_TypeError, "combine takes 5 to 14 positional arguments, got %zd", nargs);
    return nullptr;
  }
  if (!torch().tensor) {
    PyErr_SetString(PyExc_RuntimeError, "combine: import pyflowmap.ops first");
    return nullptr;
  }
  // A dtype or a choice of outputs is for Python to work out.
  for (Py_ssize_t i = 12; i < nargs; ++i) {
    if (args[i] != Py_None) Py_RETURN_FALSE;
  }
  return as_bool(perform(args, nargs, args[4] == Py_True));
}

}  // namespace pyflowmap
