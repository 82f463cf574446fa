// rows.h - one call of a kernel given as a tuple of tensors: read, checked, run on the device where they lie.
#pragma once
#include <Python.h>

#include <utility>

#include "bindings/dlpack.h"
#include "bindings/perform.h"
#include "common/rows.h"
#include "common/status.h"

namespace pyflowmap {

// The tensors of a call by position. A "no" is remembered: read all, ask `fine` once. Python, which has checked shapes
// and says faults in words, takes it for an error of its own.
class Tensors {
 public:
  explicit Tensors(PyObject* tuple);

  bool has(int i) const { return i < count_ && PyTuple_GET_ITEM(tuple_, i) != Py_None; }
  // The i-th tensor, on the device of the first. Null where it is None, or no plain tensor (then the call is refused).
  const dlpack::Tensor* at(int i);
  // A tensor of four dimensions whose last one is dense (or of size 1) as Rows; a dimension that it broadcasts from
  // size 1 has stride 0. `shape`: what the four dimensions must be.
  Rows rows(int i, const int64_t (&shape)[4]);
  // A contiguous tensor of `numbers` numbers of type `dtype`.
  void* dense(int i, int64_t numbers, DType dtype);
  // A contiguous tensor of `numbers` int64.
  const int64_t* integers(int i, int64_t numbers);
  void refuse() { answer_ = kNo; }
  Answer answer() const { return answer_; }

  bool runs_on_cpu() const;
  // Runs on the device of the first tensor, without the interpreter's lock where `large`.
  template <class Cpu, class Cuda> Answer run(const char* name, bool large, const Cpu& on_cpu, const Cuda& on_cuda) {
    void* stream = nullptr;
    int device = 0;
    if (answer_ != kYes || !place(&device, &stream)) return answer_;
    Status status;
    PyThreadState* state = large ? PyEval_SaveThread() : nullptr;
    status = runs_on_cpu() ? on_cpu() : on_cuda(device, stream);
    if (state) PyEval_RestoreThread(state);
    return finish(name, status);
  }

 private:
  bool on_cpu() const { return tensors_[0].device.device_type == dlpack::kCPU; }
  bool place(int* device, void** stream);
  Answer finish(const char* name, const Status& status);

  static constexpr int kMost = 32;
  PyObject* tuple_;
  int count_ = 0;
  Answer answer_ = kYes;
  bool read_[kMost] = {};
  dlpack::Tensor tensors_[kMost];
};

// In a build without them, the device's kernels are not named: CUDA_CALL(f(p, device, stream)).
#if defined(PYFLOWMAP_CUDA) || defined(PYFLOWMAP_SIMT)
#define CUDA_CALL(call) (call)
#else
#define CUDA_CALL(call) \
  (static_cast<void>(device), static_cast<void>(stream), Status{1, "this build has no CUDA back end"})
#endif

}  // namespace pyflowmap
