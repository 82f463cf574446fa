// launch.h - the one way a kernel is launched, under nvcc and in the emulator (-DPYFLOWMAP_SIMT=1, csrc/simt).
//
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)  -> Status      (parenthesise kernel<A, B>)
//   SHARED(type, name, n);            type name[n] in shared memory
//   DYNAMIC_SHARED(type, name);       type* name: the launch's shared_bytes
//   allow_shared(kernel, bytes)       before more than 48 KB of dynamic shared memory are asked for
//   UNROLL, NO_UNROLL                 before a loop
//   barrier_sync(id, threads), barrier_arrive(id, threads)          named barriers 1..15
//
// A launch returns what cudaGetLastError() says; faults of the kernel itself arrive with a later call, as ever.
#pragma once
#include <cstddef>

#include "common/status.h"

#if defined(PYFLOWMAP_SIMT)
#include "simt/simt.h"
#define UNROLL
#define NO_UNROLL
#else
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#include <cuda_runtime.h>

#include <atomic>

#define SHARED(type, name, n) __shared__ __align__(16) type name[n]
#define DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_)
#endif

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::pyflowmap::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace pyflowmap {

template <class T> struct Identity { using type = T; };

#if defined(PYFLOWMAP_SIMT)

using Stream = void*;

template <class... P>
Status launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
              typename Identity<P>::type... arguments) {
  const simt::Call<P...> call{kernel, {arguments...}};
  return simt::run_grid(name, reinterpret_cast<const void*>(kernel), {grid, block, shared_bytes},
                        &simt::Call<P...>::thread_main, &call);
}

template <class... P> Status allow_shared(void (*kernel)(P...), size_t bytes) {
  return simt::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

inline Status multiprocessors(int, int* count) {
  *count = simt::options().multiprocessors;
  return {};
}

inline void barrier_sync(int id, int threads, SIMT_SITE) { simt::named_barrier(id, threads, true, file, line); }
inline void barrier_arrive(int id, int threads, SIMT_SITE) { simt::named_barrier(id, threads, false, file, line); }

// Runs what follows on `device`.
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  Status status() const { return {}; }
};

#else

using Stream = cudaStream_t;

inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? Status{} : Status{static_cast<int>(error), cudaGetErrorString(error)};
}

template <class... P>
Status launch(const char*, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
              typename Identity<P>::type... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return status_of(cudaGetLastError());
}

template <class... P> Status allow_shared(void (*kernel)(P...), size_t bytes) {
  return status_of(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// The number of multiprocessors of a device, asked once.
inline Status multiprocessors(int device, int* count) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked yet; two threads that ask at once write the same number
  const bool cached = device >= 0 && device < kDevices;
  *count = cached ? known[device].load() : 0;
  if (*count) return {};
  const Status status = status_of(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
  if (status.ok() && cached) known[device] = *count;
  return status;
}

#ifdef __CUDACC__
static __device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

// Makes `device` current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = status_of(cudaGetDevice(&previous_));
    if (!status_.ok() || previous_ == device) return;
    status_ = status_of(cudaSetDevice(device));
    changed_ = status_.ok();
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  Status status() const { return status_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  Status status_;
};

#endif

}  // namespace pyflowmap
