// row_device.h - steps that row-wise kernels share on the device: reading and writing a vector of elements of any
// storage type, finding a row under its outer dimensions, adding up over a warp or a block.
//
// Width elements of one operand are at most 16 bytes: 4 of any type (Width 4), or 8 of a 16-bit type (Width 8); 2 where
// sums take most of the registers (Width 2). Reading leaves the bits as they are, so that all loads are in flight before
// the first conversion waits for one.
#pragma once
#include "common/launch.h"
#include "common/rows.h"

namespace pyflowmap {
namespace row_device {

// ---- vectors of elements: of an Operand with data, dtype and aligned (every full vector starts at a multiple of its own
// size); `at` counts elements from data -------------------------------------------------------------------------------

template <int Words> static __device__ __forceinline__ void read_words(uint32_t (&bits)[4], const void* from) {
  if constexpr (Words == 4) {
    const uint4 v = *static_cast<const uint4*>(from);
    bits[0] = v.x;
    bits[1] = v.y;
    bits[2] = v.z;
    bits[3] = v.w;
  } else if constexpr (Words == 2) {
    const uint2 v = *static_cast<const uint2*>(from);
    bits[0] = v.x;
    bits[1] = v.y;
  } else {
    bits[0] = *static_cast<const uint32_t*>(from);
  }
}

// By intrinsic: the compiler splits a plain vector store, to share its parts with the scalar path beside it.
template <int Words> static __device__ __forceinline__ void write_words(void* to, const uint32_t (&bits)[Words]) {
  if constexpr (Words == 4) __stwb(static_cast<uint4*>(to), make_uint4(bits[0], bits[1], bits[2], bits[3]));
  else if constexpr (Words == 2) __stwb(static_cast<uint2*>(to), make_uint2(bits[0], bits[1]));
  else *static_cast<uint32_t*>(to) = bits[0];
}

// `valid` elements (at least one) are inside the row; the others read as 0.
template <int Width, class Operand>
static __device__ __forceinline__ void read(uint32_t (&bits)[4], const Operand& x, int64_t at, int valid) {
  if (Width <= 4 && x.dtype == DType::f32) {
    constexpr int kWords = Width <= 4 ? Width : 4;
    const auto* from = static_cast<const uint32_t*>(x.data) + at;
    if (x.aligned && valid >= Width) {
      read_words<kWords>(bits, from);
      return;
    }
    UNROLL
    for (int i = 0; i < kWords; ++i) bits[i] = i < valid ? from[i] : 0u;
    return;
  }
  const auto* from = static_cast<const uint16_t*>(x.data) + at;
  if (x.aligned && valid >= Width) {
    read_words<Width / 2>(bits, from);
    return;
  }
  UNROLL
  for (int i = 0; i < Width / 2; ++i) {
    const uint32_t low = 2 * i < valid ? from[2 * i] : 0u, high = 2 * i + 1 < valid ? from[2 * i + 1] : 0u;
    bits[i] = low | high << 16;
  }
}

template <class T> static __device__ __forceinline__ float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(which ? pair >> 16 : pair & 0xffffu)});
}

template <int Width>
static __device__ __forceinline__ void widen(float (&to)[Width], const uint32_t (&bits)[4], DType dtype) {
  if (Width <= 4 && dtype == DType::f32) {
    UNROLL
    for (int i = 0; i < Width; ++i) to[i] = float_of(bits[i % 4]);
  } else if (dtype == DType::bf16) {
    UNROLL
    for (int i = 0; i < Width; ++i) to[i] = half_of<bf16>(bits[i / 2], i % 2);
  } else {
    UNROLL
    for (int i = 0; i < Width; ++i) to[i] = half_of<f16>(bits[i / 2], i % 2);
  }
}

template <class T> static __device__ __forceinline__ uint32_t pair_of(float low, float high) {
  T a, b;
  store(&a, low);
  store(&b, high);
  return static_cast<uint32_t>(a.bits) | static_cast<uint32_t>(b.bits) << 16;
}

template <int Width, class Operand>
static __device__ __forceinline__ void write(const Operand& y, int64_t at, const float (&from)[Width], int valid) {
  if (Width <= 4 && y.dtype == DType::f32) {
    auto* to = static_cast<float*>(y.data) + at;
    if (y.aligned && valid >= Width) {
      constexpr int kWords = Width <= 4 ? Width : 4;
      uint32_t bits[kWords];
      UNROLL
      for (int i = 0; i < kWords; ++i) bits[i] = bits_of(from[i]);
      write_words<kWords>(to, bits);
      return;
    }
    UNROLL
    for (int i = 0; i < Width; ++i) {
      if (i < valid) to[i] = from[i];
    }
    return;
  }
  uint32_t bits[Width / 2];
  UNROLL
  for (int i = 0; i < Width / 2; ++i) {
    bits[i] = y.dtype == DType::bf16 ? pair_of<bf16>(from[2 * i], from[2 * i + 1])
                                     : pair_of<f16>(from[2 * i], from[2 * i + 1]);
  }
  auto* to = static_cast<uint16_t*>(y.data) + at;
  if (y.aligned && valid >= Width) {
    write_words<Width / 2>(to, bits);
    return;
  }
  UNROLL
  for (int i = 0; i < Width; ++i) {
    if (i < valid) to[i] = static_cast<uint16_t>(bits[i / 2] >> (16 * (i % 2)));
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

struct DeviceRows : Rows {  // Rows as the kernels see them
  bool aligned = false;
};

// `width` elements per access.
inline DeviceRows device_rows(const Rows& x, const RowShape& shape, int width) {
  const auto bytes = static_cast<int64_t>(width) * size_of(x.dtype);
  DeviceRows rows;
  static_cast<Rows&>(rows) = x;
  rows.aligned = reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(bytes) == 0;
  for (int d = 0; d < 3; ++d) {
    if (shape.outer[d] > 1 && x.stride[d] * size_of(x.dtype) % bytes != 0) rows.aligned = false;
  }
  return rows;
}

// 8 elements per access where all that are given are 16 bits wide and lie on 16 bytes.
template <size_t N> int width_for(const Rows* const (&all)[N], const RowShape& shape) {
  for (const Rows* x : all) {
    if (*x && (size_of(x->dtype) != 2 || !device_rows(*x, shape, 8).aligned)) return 4;
  }
  return 8;
}

struct RowIndex { int64_t at[3]; };

static __device__ __forceinline__ RowIndex index_of(const RowShape& shape, int64_t row) {
  RowIndex index;
  if (row <= 0x7fffffff && shape.outer[1] <= 0x7fffffff && shape.outer[2] <= 0x7fffffff) {
    // 32-bit divisions cost a fifth of 64-bit ones
    const auto r = static_cast<uint32_t>(row), m = static_cast<uint32_t>(shape.outer[1]),
               n = static_cast<uint32_t>(shape.outer[2]);
    const uint32_t outer = r / n;
    index.at[2] = r - outer * n;
    index.at[0] = outer / m;
    index.at[1] = outer - (outer / m) * m;
    return index;
  }
  index.at[2] = row % shape.outer[2];
  index.at[1] = row / shape.outer[2] % shape.outer[1];
  index.at[0] = row / shape.outer[2] / shape.outer[1];
  return index;
}

// Where a row starts, in elements from data.
static __device__ __forceinline__ int64_t start_of(const Rows& x, const RowIndex& index) {
  return index.at[0] * x.stride[0] + index.at[1] * x.stride[1] + index.at[2] * x.stride[2];
}

// The bits of Width elements of a row that begins at `start`; 0 where there is no operand, and past the row's end.
template <int Width>
static __device__ __forceinline__ void fetch(uint32_t (&bits)[4], const DeviceRows& x, int64_t start, int64_t column,
                                             int64_t columns) {
  UNROLL
  for (int i = 0; i < 4; ++i) bits[i] = 0u;
  if (!x.data || column >= columns) return;
  read<Width>(bits, x, start + column, columns - column < Width ? static_cast<int>(columns - column) : Width);
}

template <int Width>
static __device__ __forceinline__ void put(const DeviceRows& y, int64_t start, int64_t column, int64_t columns,
                                           const float (&from)[Width]) {
  if (!y.data || column >= columns) return;
  write<Width>(y, start + column, from, columns - column < Width ? static_cast<int>(columns - column) : Width);
}

static __device__ __forceinline__ void put_one(const Rows& y, int64_t at, float value) {
  if (y.dtype == DType::f32) static_cast<float*>(y.data)[at] = value;
  else if (y.dtype == DType::bf16) store(static_cast<bf16*>(y.data) + at, value);
  else store(static_cast<f16*>(y.data) + at, value);
}

// ---- sums over the threads that hold a row --------------------------------------------------------------------------

// Every lane gets the sums; the order depends on nothing.
template <int N> static __device__ __forceinline__ void warp_sums(float (&sums)[N]) {
  UNROLL
  for (int m = 16; m > 0; m >>= 1) {
    UNROLL
    for (int i = 0; i < N; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], m);
  }
}

// Over all warps of a block; `space` is shared, 32 * N floats. Called by every thread.
template <int N> static __device__ __forceinline__ void block_sums(float (&sums)[N], float* space) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  warp_sums(sums);
  __syncthreads();  // the last sums have been read
  if (lane == 0) {
    UNROLL
    for (int i = 0; i < N; ++i) space[warp * N + i] = sums[i];
  }
  __syncthreads();
  UNROLL
  for (int i = 0; i < N; ++i) sums[i] = lane < warps ? space[lane * N + i] : 0.0f;
  warp_sums(sums);
}

}  // namespace row_device
}  // namespace pyflowmap
