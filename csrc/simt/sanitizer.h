// sanitizer.h - what the runtime tells AddressSanitizer and ThreadSanitizer, through weak symbols.
//
// The runtime itself is compiled without instrumentation: its bookkeeping is not part of the emulated program, and the
// scheduler's own accesses would drown the kernel's. Weak symbols let the same objects serve all three builds.
#pragma once
#include <cstddef>

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* begin, std::size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* begin, std::size_t size);

__attribute__((weak)) void* __tsan_get_current_fiber(void);
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

namespace simt {

inline bool under_asan() { return __asan_poison_memory_region != nullptr; }
inline bool under_tsan() { return __tsan_create_fiber != nullptr; }

inline void poison(const void* begin, std::size_t size) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(begin, size);
}
inline void unpoison(const void* begin, std::size_t size) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(begin, size);
}
inline void acquire(void* address) {
  if (__tsan_acquire && address) __tsan_acquire(address);
}
inline void release(void* address) {
  if (__tsan_release && address) __tsan_release(address);
}

// An address that stands for one synchronisation event. Addresses are handed out in rotation and not reused soon:
// a barrier that shared its address with the previous one (or with another block's) would order accesses that the
// program leaves unordered, and hide the race between them.
void* fresh_sync_address();

}  // namespace simt
