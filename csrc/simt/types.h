// types.h - CUDA's qualifiers and small vectors, for a host compiler.
#pragma once
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The alignments are CUDA's: a misaligned vector access faults on the device and under UBSan.
#define SIMT_VECTORS(type, name, align2, align4)                                      \
  struct name##1 { type x; };                                                         \
  struct alignas(align2) name##2 { type x, y; };                                      \
  struct name##3 { type x, y, z; };                                                   \
  struct alignas(align4) name##4 { type x, y, z, w; };                                \
  inline name##2 make_##name##2(type x, type y) { return name##2 {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return name##3 {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return name##4 {x, y, z, w}; }
SIMT_VECTORS(signed char, char, 2, 4)
SIMT_VECTORS(unsigned char, uchar, 2, 4)
SIMT_VECTORS(short, short, 4, 8)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(unsigned, uint, 8, 16)
SIMT_VECTORS(long long, longlong, 16, 16)
SIMT_VECTORS(unsigned long long, ulonglong, 16, 16)
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(double, double, 16, 16)
#undef SIMT_VECTORS

namespace simt {

// Where the running thread is. One per host thread; the scheduler writes it before it resumes a fiber.
struct Position { uint3 thread, block, block_extent, grid_extent; };
extern __thread Position here;

}  // namespace simt

#define threadIdx (::simt::here.thread)
#define blockIdx (::simt::here.block)
#define blockDim (::simt::here.block_extent)
#define gridDim (::simt::here.grid_extent)
inline constexpr int warpSize = 32;
