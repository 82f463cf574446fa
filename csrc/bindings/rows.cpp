// rows.cpp - see rows.h.
#include "bindings/rows.h"

#include "bindings/border.h"
#include "bindings/operands.h"

namespace pyflowmap {

Tensors::Tensors(PyObject* tuple) : tuple_(tuple) {
  if (!torch().tensor || !PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) > kMost) {
    answer_ = kNo;
    return;
  }
  count_ = static_cast<int>(PyTuple_GET_SIZE(tuple));
  if (count_ == 0 || !has(0)) answer_ = kNo;
  else at(0);
}

const dlpack::Tensor* Tensors::at(int i) {
  if (answer_ != kYes || !has(i)) return nullptr;
  dlpack::Tensor* t = &tensors_[i];
  if (read_[i]) return t;
  PyObject* object = PyTuple_GET_ITEM(tuple_, i);
  if (!view(object, t) || (i > 0 && !same_device(*t, tensors_[0]))) {
    answer_ = kNo;
    return nullptr;
  }
  const int plain = is_plain(object, false, false);  // a neg view, whose storage has the other sign
  if (plain != 1) {
    answer_ = plain < 0 ? kError : kNo;
    return nullptr;
  }
  read_[i] = true;
  return t;
}

Rows Tensors::rows(int i, const int64_t (&shape)[4]) {
  Rows rows;
  const dlpack::Tensor* t = at(i);
  if (!t) return rows;
  bool fits = t->ndim == 4 && storage_type(*t, &rows.dtype) && t->shape[3] == shape[3] &&
              (t->strides[3] == 1 || t->shape[3] <= 1);
  for (int d = 0; fits && d < 3; ++d) {
    fits = t->shape[d] == shape[d] || t->shape[d] == 1;
    rows.stride[d] = t->shape[d] == 1 ? 0 : t->strides[d];
  }
  if (!fits) {
    answer_ = kNo;
    return {};
  }
  rows.data = t->data;
  return rows;
}

void* Tensors::dense(int i, int64_t numbers, DType dtype) {
  const dlpack::Tensor* t = at(i);
  if (!t) return nullptr;
  DType found;
  int64_t expected = 1;
  bool fits = storage_type(*t, &found) && found == dtype;
  for (int d = t->ndim - 1; fits && d >= 0; --d) {
    fits = t->shape[d] == 1 || t->strides[d] == expected;
    expected *= t->shape[d];
  }
  if (!fits || expected != numbers) {
    answer_ = kNo;
    return nullptr;
  }
  return t->data;
}

const int64_t* Tensors::integers(int i, int64_t numbers) {
  const dlpack::Tensor* t = at(i);
  if (!t) return nullptr;
  if (!is_int64(*t) || t->ndim != 1 || t->shape[0] != numbers || (numbers > 1 && t->strides[0] != 1)) {
    answer_ = kNo;
    return nullptr;
  }
  return static_cast<const int64_t*>(t->data);
}

bool Tensors::runs_on_cpu() const {
#if defined(PYFLOWMAP_SIMT)
  return false;  // the emulator's device is the CPU
#else
  return on_cpu();
#endif
}

bool Tensors::place(int* device, void** stream) {
#if !defined(PYFLOWMAP_CUDA)
  if (!on_cpu()) {
    answer_ = kNo;
    return false;
  }
#endif
  *device = tensors_[0].device.device_id;
  if (work_stream(PyTuple_GET_ITEM(tuple_, 0), tensors_[0], stream)) return true;
  answer_ = kError;
  return false;
}

Answer Tensors::finish(const char* name, const Status& status) {
  if (status.ok()) return kYes;
  PyErr_Format(PyExc_RuntimeError, "%s failed: %s (code %d)", name, status.message, status.code);
  return kError;
}

}  // namespace pyflowmap
