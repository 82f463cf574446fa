// status.h - what a kernel returns. The binding turns a failure into one Python exception; kernels never throw.
#pragma once

namespace pyflowmap {

struct Status {
  int code = 0;              // 0 is success; otherwise the back end's own code (cudaError_t for CUDA)
  const char* message = "";  // static storage, or storage that lives until the thread's next kernel call
  bool ok() const { return code == 0; }
};

}  // namespace pyflowmap
