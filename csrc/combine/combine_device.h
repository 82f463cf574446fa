// combine_device.h - what the launcher of combine.cu hands to its kernels, and the small steps that kernels share:
// forming coefficients, drawing noise, looking up the mask.
#pragma once
#include "combine/combine.h"
#include "common/launch.h"
#include "common/philox.h"
#include "common/row_device.h"

namespace pyflowmap {
namespace combine_device {

using row_device::read;
using row_device::widen;
using row_device::write;

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
