// launch.h - runs a kernel's grid on the host.
#pragma once
#include <cstddef>
#include <tuple>
#include <utility>

#include "common/status.h"
#include "simt/types.h"

namespace simt {

struct Grid {
  dim3 blocks, threads;
  std::size_t shared_bytes = 0;  // dynamic
};

// Runs thread_main(arguments) once per CUDA thread. The message of a failure lives until the host thread's next launch.
pyflowmap::Status run_grid(const char* name, const void* kernel, const Grid& grid, void (*thread_main)(const void*),
                           const void* arguments);

// Dynamic shared memory above 48 KB has to be allowed first, as on the device.
pyflowmap::Status allow_shared(const void* kernel, std::size_t bytes);

template <class... P> struct Call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;
  static void thread_main(const void* self) {
    const Call& call = *static_cast<const Call*>(self);
    std::apply(call.kernel, call.arguments);  // parameters are passed by value: every thread has its own copy
  }
};

}  // namespace simt
