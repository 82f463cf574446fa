// combine_device.h - what the launcher of combine.cu hands to its kernels, and the small steps that kernels share:
// forming coefficients, reading and writing a vector of elements, drawing noise, looking up the mask.
#pragma once
#include "combine/combine.h"
#include "common/launch.h"
#include "common/philox.h"

namespace pyflowmap {
namespace combine_device {

constexpr int kWarpsPerBlock = 4;  // small blocks: registers are handed out in smaller pieces
constexpr int kThreads = 32 * kWarpsPerBlock;
constexpr int kFactors = kMaxOutputs * kMaxTerms;
constexpr int kMaxReductions = kMaxOutputs * (kMaxOutputs + 1) / 2 + kMaxOutputs * kMaxTerms + kMaxOutputs;
constexpr int kBlockFactors = kWarpsPerBlock * kFactors, kBlockReductions = kWarpsPerBlock * kMaxReductions;

struct Factors {
  double scalar[kFactors];
  const void* vector[kFactors];
  int64_t stride[kFactors];
  bool is_double[kFactors];
};

struct DeviceOperand {  // an operand as the kernels see it
  void* data;
  int64_t row_stride;
  DType dtype;
  bool aligned;  // every full vector of it starts at a multiple of its own size
};

struct Arguments {
  int inputs, outputs, terms;  // terms counts the noise
  int64_t rows, columns;
  // The cut into units depends on the shape alone, so that the order of every sum does too.
  int columns_per_unit, units_per_row;
  // From a warp's unit to its next: the number of warps in the grid, as rows and units of a row.
  int64_t step_rows;
  int step_units;
  DeviceOperand x[kMaxInputs], y[kMaxOutputs];
  Factors a;
  bool clamp[kMaxOutputs];
  float low[kMaxOutputs], high[kMaxOutputs];
  // Reductions, in this order: gram (upper triangle, row by row), cross, sums.
  int gram_count, cross_count, sums_count;
  float *gram, *cross, *sums;
  float* partials;  // [rows, reductions, units_per_row]; null where a unit is a whole row
};

// The rarely used part travels only with the kernels that read it: parameters are copied at every launch.
struct ArgumentsWithExtras : Arguments {
  Factors b;
  Noise noise;
  Mask mask;
};

// ---- coefficients ---------------------------------------------------------------------------------------------------

// Formed in double, rounded once. A scalar of 0 leaves its vector unread.
static __device__ __forceinline__ float coefficient(const Factors& f, int i, int64_t row) {
  const double scalar = f.scalar[i];
  if (scalar == 0.0) return 0.0f;
  const void* vector = f.vector[i];
  if (!vector) return static_cast<float>(scalar);
  const int64_t at = row * f.stride[i];
  const double factor = f.is_double[i] ? static_cast<const double*>(vector)[at]
                                       : static_cast<double>(static_cast<const float*>(vector)[at]);
  return static_cast<float>(mul_rn(scalar, factor));
}

// ---- vectors of elements --------------------------------------------------------------------------------------------
// Width elements of one operand are at most 16 bytes: 4 of any type (Width 4), or 8 of a 16-bit type (Width 8); 2 where
// sums take most of the registers (Width 2).
// Reading leaves the bits as they are, so that all loads are in flight before the first conversion waits for one.

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

// `valid` elements (at least one) are inside the row.
template <int Width>
static __device__ __forceinline__ void read(uint32_t (&bits)[4], const DeviceOperand& x, int64_t at, int valid) {
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

template <int Width>
static __device__ __forceinline__ void write(const DeviceOperand& y, int64_t at, const float (&from)[Width],
                                             int valid) {
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

// ---- noise and mask -------------------------------------------------------------------------------------------------

static __device__ __forceinline__ int64_t map_index(const IndexMap& map, int64_t position) {
  if (map.dims == 0) return position;
  int64_t index = 0;
  if (position <= 0x7fffffff) {  // 32-bit divisions cost a fifth of 64-bit ones
    auto rest = static_cast<uint32_t>(position);
    for (int d = map.dims - 1; d >= 0; --d) {
      const int64_t size = map.size[d];
      if (size > 0x7fffffff) return index + static_cast<int64_t>(rest) * map.stride[d];
      const uint32_t next = rest / static_cast<uint32_t>(size);
      index += static_cast<int64_t>(rest - next * static_cast<uint32_t>(size)) * map.stride[d];
      rest = next;
    }
    return index;
  }
  for (int d = map.dims - 1; d >= 0; --d) {
    const int64_t next = position / map.size[d];
    index += (position - next * map.size[d]) * map.stride[d];
    position = next;
  }
  return index;
}

struct NoiseRow {  // what the elements of a row share
  uint64_t seed, sample;
  uint32_t stream;
  int64_t first_element;
};

static __device__ __forceinline__ NoiseRow noise_of_row(const Noise& noise, int64_t row, int64_t columns) {
  const int64_t group = noise.rows_per_sample == 1 ? row : row / noise.rows_per_sample;
  NoiseRow r;
  r.seed = noise.seed + (noise.seed_data ? static_cast<uint64_t>(*noise.seed_data) : 0u);
  r.stream = noise.stream + (noise.stream_data ? static_cast<uint32_t>(*noise.stream_data) : 0u);
  r.sample = static_cast<uint64_t>(noise.sample_ids ? noise.sample_ids[group] : group);
  r.first_element = (row - group * noise.rows_per_sample) * columns;
  return r;
}

// Count (2 or 4) consecutive memory positions, the first a multiple of Count.
template <int Count>
static __device__ __forceinline__ void draw(float* to, const NoiseRow& r, const IndexMap& logical, int64_t position) {
  if (logical.dims == 0) {
    const int64_t element = r.first_element + position;
    const auto block = static_cast<uint32_t>(element >> 2);
    const int skip = static_cast<int>(element & 3);
    float eight[8] = {};
    normals_of_block(r.seed, r.sample, r.stream, block, eight);
    if (skip + Count > 4)
      normals_of_block(r.seed, r.sample, r.stream, block + 1, eight + 4);  // rows not of 4 n elements
    UNROLL
    for (int i = 0; i < Count; ++i) {
      const float low = skip & 1 ? eight[i + 1] : eight[i], high = skip & 1 ? eight[i + 3] : eight[i + 2];
      to[i] = skip & 2 ? high : low;
    }
    return;
  }
  NO_UNROLL
  for (int i = 0; i < Count; ++i) {
    const int64_t element = r.first_element + map_index(logical, position + i);
    float four[4];
    normals_of_block(r.seed, r.sample, r.stream, static_cast<uint32_t>(element >> 2), four);
    const int which = static_cast<int>(element & 3);
    const float low = which & 1 ? four[1] : four[0], high = which & 1 ? four[3] : four[2];
    const float drawn = which & 2 ? high : low;
    UNROLL
    for (int n = 0; n < Count; ++n) {
      if (n == i) to[n] = drawn;  // no run-time index into registers
    }
  }
}

}  // namespace combine_device
}  // namespace pyflowmap
