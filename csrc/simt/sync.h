// sync.h - barriers, shuffles, votes and warp reductions, under CUDA's names.
//
// Each takes its call site by default argument, so that an error can say where the threads wait.
// Memory is ordered by __syncthreads, named barriers and __syncwarp. A shuffle or a vote orders nothing: the race build
// reports a kernel that relies on one in place of __syncwarp.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {

enum class Vote { none, count, all, any };
enum class Shuffle { index, up, down, butterfly };
enum class Reduce { add_u, min_u, max_u, min_s, max_s, and_u, or_u, xor_u };

int block_barrier(Vote vote, int predicate, const char* file, int line);
void named_barrier(int id, int threads, bool wait, const char* file, int line);
void warp_barrier(unsigned mask, const char* file, int line);
std::uint64_t warp_shuffle(Shuffle kind, unsigned mask, std::uint64_t value, int lane, int width, const char* file,
                           int line);
unsigned warp_ballot(unsigned mask, bool predicate, const char* file, int line);
unsigned warp_active();
unsigned warp_match(unsigned mask, std::uint64_t value, const char* file, int line);
std::uint32_t warp_reduce(Reduce kind, unsigned mask, std::uint32_t value, const char* file, int line);
void device_fence();

template <class T>
inline T shuffle(Shuffle kind, unsigned mask, T value, int lane, int width, const char* file, int line) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_shuffle(kind, mask, bits, lane, width, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

inline void __syncthreads(SIMT_SITE) { simt::block_barrier(simt::Vote::none, 0, file, line); }
inline int __syncthreads_count(int p, SIMT_SITE) { return simt::block_barrier(simt::Vote::count, p, file, line); }
inline int __syncthreads_and(int p, SIMT_SITE) { return simt::block_barrier(simt::Vote::all, p, file, line); }
inline int __syncthreads_or(int p, SIMT_SITE) { return simt::block_barrier(simt::Vote::any, p, file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) { simt::warp_barrier(mask, file, line); }
inline void __threadfence() { simt::device_fence(); }
inline void __threadfence_block() { simt::device_fence(); }
inline void __threadfence_system() { simt::device_fence(); }

template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::Shuffle::index, mask, value, source, width, file, line);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::Shuffle::up, mask, value, static_cast<int>(delta), width, file, line);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::Shuffle::down, mask, value, static_cast<int>(delta), width, file, line);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::Shuffle::butterfly, mask, value, lane_mask, width, file, line);
}

inline unsigned __activemask() { return simt::warp_active(); }
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::warp_ballot(mask, predicate != 0, file, line);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::warp_ballot(mask, predicate != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::warp_ballot(mask, predicate == 0, file, line) == 0;
}
template <class T> inline unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "a match compares at most 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return simt::warp_match(mask, bits, file, line);
}

#define SIMT_REDUCE(name, type, kind)                                                                \
  inline type name(unsigned mask, type value, SIMT_SITE) {                                           \
    return static_cast<type>(                                                                        \
        simt::warp_reduce(simt::Reduce::kind, mask, static_cast<std::uint32_t>(value), file, line)); \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned, add_u)
SIMT_REDUCE(__reduce_min_sync, unsigned, min_u)
SIMT_REDUCE(__reduce_max_sync, unsigned, max_u)
SIMT_REDUCE(__reduce_add_sync, int, add_u)
SIMT_REDUCE(__reduce_min_sync, int, min_s)
SIMT_REDUCE(__reduce_max_sync, int, max_s)
SIMT_REDUCE(__reduce_and_sync, unsigned, and_u)
SIMT_REDUCE(__reduce_or_sync, unsigned, or_u)
SIMT_REDUCE(__reduce_xor_sync, unsigned, xor_u)
#undef SIMT_REDUCE
