// async_copy.h - global to shared memory without passing through registers (cp.async, compute capability 8.0).
//
//   async_copy<16>(shared, global)              4, 8 or 16 bytes, both addresses aligned to them
//   async_copy<16>(shared, global, n)           reads only n bytes, the rest of shared becomes 0
//   async_commit()                              closes a group
//   async_wait<N>()                             until at most N of this thread's groups are in flight; then a barrier
//                                               makes the data visible to the other threads
#pragma once
#include "common/launch.h"

namespace pyflowmap {

#if defined(PYFLOWMAP_SIMT)

template <int Bytes> inline void async_copy(void* shared, const void* global, int bytes = Bytes, SIMT_SITE) {
  simt::async_copy<Bytes>(shared, global, bytes, file, line);
}
inline void async_commit() { simt::async_commit(); }
template <int Groups> inline void async_wait() { simt::async_wait(Groups); }

#elif defined(__CUDACC__)

template <int Bytes> static __device__ __forceinline__ void async_copy(void* shared, const void* global,
                                                                       int bytes = Bytes) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(Bytes), "r"(bytes)
                 : "memory");
  }
}
static __device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Groups> static __device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

#endif

}  // namespace pyflowmap
