// combine_kernel.h - the kernels of combine.cu: one pass over a unit of a row, and the sum of a row's partials.
//
// A warp takes a unit: up to 1024 consecutive elements of one row (more, where reductions would leave too many
// partials). It forms the row's coefficients once, then walks the unit with every load of a step in flight before the
// first is used. A lane reads all inputs of its elements before it writes any output of them, which is what makes
// "an output may be exactly an input" safe.
#pragma once
#include <type_traits>

#include "combine/combine_device.h"

namespace pyflowmap {
namespace combine_device {
namespace {

enum class Sums { none, gram, all };  // gram: the Gram matrix and the row sums; all: the cross Gram as well

// One value of a row's reductions, in the order of Arguments, to its place in the results.
__device__ void write_reduction(const Arguments& p, int64_t row, int i, float value) {
  const int K = p.outputs;
  if (i < p.gram_count) {
    int k = 0;
    for (; i >= K - k; ++k) i -= K - k;
    float* gram = p.gram + row * K * K;
    gram[k * K + k + i] = value;
    gram[(k + i) * K + k] = value;
    return;
  }
  i -= p.gram_count;
  if (i < p.cross_count) p.cross[row * p.cross_count + i] = value;
  else p.sums[row * K + i - p.cross_count] = value;
}

__device__ __forceinline__ float warp_sum(float value) {
  UNROLL
  for (int m = 16; m > 0; m >>= 1) value = add_rn(value, __shfl_xor_sync(0xffffffffu, value, m));
  return value;
}

// Args    Arguments, or ArgumentsWithExtras: noise and mask
// J, K    bounds of the unrolled loops over inputs and, where sums are kept in registers, outputs
// Width   elements per access (4, or 8 where all operands are 16 bits wide); Steps accesses per operand in flight
template <class Args, int J, int K, int Width, int Steps, Sums sums, int BlocksPerMultiprocessor>
__global__ void __launch_bounds__(kThreads, BlocksPerMultiprocessor) combine_kernel(const __grid_constant__ Args p) {
  constexpr bool kExtras = std::is_same<Args, ArgumentsWithExtras>::value;
  constexpr bool kSums = sums != Sums::none;
  constexpr int kTerms = J + (kExtras ? 1 : 0);  // the noise comes last
  constexpr int kGram = kSums ? K * (K + 1) / 2 : 1, kCross = sums == Sums::all ? K * kTerms : 1,
                kTotals = kSums ? K : 1;
  constexpr int kStep = 32 * Width, kDraw = Width < 4 ? Width : 4;

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  SHARED(float, all_a, kBlockFactors);
  SHARED(float, all_b, (kExtras ? kBlockFactors : 1));
  SHARED(float, all_results, (kSums ? kBlockReductions : 1));
  float* const a = &all_a[warp * kFactors];
  float* const b = &all_b[kExtras ? warp * kFactors : 0];

  int64_t row = (static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp) / p.units_per_row;
  int part = static_cast<int>((static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp) % p.units_per_row);
  bool new_row = true;
  uint32_t needed = 0;  // inputs with a coefficient that is not 0; bit kMaxInputs is the noise
  NoiseRow noise = {};
  while (row < p.rows) {
    if (new_row) {
      __syncwarp();  // the last row's coefficients have been read
      uint32_t found = 0;
      for (int i = lane; i < p.outputs * kMaxTerms; i += 32) {
        const int j = i % kMaxTerms;
        const bool used = j < p.inputs;
        float ca = 0.0f;
        if (used) ca = coefficient(p.a, i, row);
        if constexpr (kExtras) {
          const bool drawn = j == kMaxInputs && p.noise.present;
          if (drawn) ca = coefficient(p.a, i, row);
          float cb = 0.0f;
          if (p.mask.data && (used || drawn)) cb = coefficient(p.b, i, row);
          b[i] = cb;
          if (!(cb == 0.0f)) found |= 1u << j;
        }
        a[i] = ca;
        if (!(ca == 0.0f)) found |= 1u << j;
      }
      __syncwarp();
      needed = __reduce_or_sync(0xffffffffu, found);
      if (sums == Sums::all && p.cross_count) needed |= (1u << p.inputs) - 1u;
      if constexpr (kExtras) {
        if (p.noise.present) {
          if (p.cross_count) needed |= 1u << kMaxInputs;
          noise = noise_of_row(p.noise, row, p.columns);
        }
      }
    }

    float gram[kGram] = {}, cross[kCross] = {}, totals[kTotals] = {};
    const int64_t begin = static_cast<int64_t>(part) * p.columns_per_unit + lane * Width;  // this lane's first element
    const int64_t rest = p.columns - begin;
    const int count = rest < p.columns_per_unit ? static_cast<int>(rest) : p.columns_per_unit - lane * Width;
    for (int offset = 0; offset < count; offset += kStep * Steps) {
      const int left = count - offset;
      // ---- read
      uint32_t bits[J][Steps][4];
      float x[kTerms][Steps][Width];
      UNROLL
      for (int j = 0; j < J; ++j) {
        if (!(needed >> j & 1u)) continue;
        const int64_t at = row * p.x[j].row_stride + begin + offset;
        UNROLL
        for (int s = 0; s < Steps; ++s) {
          if (left > s * kStep) read<Width>(bits[j][s], p.x[j], at + s * kStep, left - s * kStep);
        }
      }
      float mask[kExtras ? Steps : 1][kExtras ? Width : 1] = {};
      if constexpr (kExtras) {
        if (needed >> kMaxInputs & 1u) {
          UNROLL
          for (int s = 0; s < Steps; ++s) {
            UNROLL
            for (int i = 0; i < Width; i += kDraw) {
              draw<kDraw>(&x[J][s][i], noise, p.noise.logical, begin + offset + s * kStep + i);
            }
          }
        }
        if (p.mask.data) {
          const float* from = static_cast<const float*>(p.mask.data) + row * p.mask.row_stride;
          UNROLL
          for (int s = 0; s < Steps; ++s) {
            UNROLL
            for (int i = 0; i < Width; ++i) {
              if (i < left - s * kStep) mask[s][i] = from[map_index(p.mask.index, begin + offset + s * kStep + i)];
            }
          }
        }
      }
      UNROLL
      for (int j = 0; j < J; ++j) {
        if (!(needed >> j & 1u)) continue;
        UNROLL
        for (int s = 0; s < Steps; ++s) widen<Width>(x[j][s], bits[j][s], p.x[j].dtype);
      }

      // ---- combine and write
      const auto combine = [&](float (&y)[Steps][Width], int k) {
        bool any = false;
        bool masked = false;
        if constexpr (kExtras) masked = p.mask.data != nullptr;
        // Adding to -0 returns the first term as it is, signed zero and all.
        const float zero = masked ? 0.0f : -0.0f;
        UNROLL
        for (int s = 0; s < Steps; ++s) {
          UNROLL
          for (int i = 0; i < Width; ++i) y[s][i] = zero;
        }
        UNROLL
        for (int j = 0; j < kTerms; ++j) {
          const int slot = k * kMaxTerms + (j < J ? j : kMaxInputs);
          const float ca = a[slot];
          if (kExtras && masked) {
            const float cb = b[slot];
            if (ca == 0.0f && cb == 0.0f) continue;
            any = true;
            UNROLL
            for (int s = 0; s < Steps; ++s) {
              UNROLL
              for (int i = 0; i < Width; ++i) {
                const float c = add_rn(ca, mul_rn(mask[kExtras ? s : 0][kExtras ? i : 0], cb));
                const float term = mul_rn(c, x[j][s][i]);
                y[s][i] = add_rn(y[s][i], c == 0.0f ? 0.0f : term);
              }
            }
          } else {
            if (ca == 0.0f) continue;
            any = true;
            UNROLL
            for (int s = 0; s < Steps; ++s) {
              UNROLL
              for (int i = 0; i < Width; ++i) y[s][i] = add_rn(y[s][i], mul_rn(ca, x[j][s][i]));
            }
          }
        }
        const bool clamped = p.clamp[k];
        const float low = p.low[k], high = p.high[k];
        UNROLL
        for (int s = 0; s < Steps; ++s) {
          UNROLL
          for (int i = 0; i < Width; ++i) {
            if (!any) y[s][i] = 0.0f;
            if (clamped) y[s][i] = y[s][i] < low ? low : y[s][i] > high ? high : y[s][i];
          }
        }
        if (!p.y[k].data) return;
        const int64_t at = row * p.y[k].row_stride + begin + offset;
        UNROLL
        for (int s = 0; s < Steps; ++s) {
          if (left > s * kStep) write<Width>(p.y[k], at + s * kStep, y[s], left - s * kStep);
        }
      };

      if constexpr (!kSums) {
        NO_UNROLL
        for (int k = 0; k < p.outputs; ++k) {
          float y[Steps][Width];
          combine(y, k);
        }
      } else {
        float y[K][Steps][Width];
        UNROLL
        for (int k = 0; k < K; ++k) {
          if (k >= p.outputs) break;
          combine(y[k], k);
          UNROLL
          for (int s = 0; s < Steps; ++s) {
            UNROLL
            for (int i = 0; i < Width; ++i) {
              if (i >= left - s * kStep) y[k][s][i] = 0.0f;  // past the end: nothing to any sum
            }
          }
        }
        UNROLL
        for (int k = 0; k < K; ++k) {
          if (k >= p.outputs) break;
          UNROLL
          for (int s = 0; s < Steps; ++s) {
            UNROLL
            for (int i = 0; i < Width; ++i) {
              const float v = y[k][s][i];
              if (p.gram_count) {
                UNROLL
                for (int l = k; l < K; ++l) {
                  if (l >= p.outputs) break;
                  float& sum = gram[k * K - k * (k - 1) / 2 + l - k];
                  sum = add_rn(sum, mul_rn(v, y[l][s][i]));
                }
              }
              if (p.sums_count) totals[k] = add_rn(totals[k], v);
              if (sums == Sums::all && p.cross_count) {
                UNROLL
                for (int j = 0; j < kTerms; ++j) {
                  if (!(needed >> (j < J ? j : kMaxInputs) & 1u)) continue;
                  const float w = i < left - s * kStep ? x[j][s][i] : 0.0f;
                  float& sum = cross[sums == Sums::all ? k * kTerms + j : 0];
                  sum = add_rn(sum, mul_rn(v, w));
                }
              }
            }
          }
        }
      }
    }

    // ---- the unit's sums: a fixed tree over the lanes, gathered so that they are written side by side
    if constexpr (kSums) {
      float* const results = &all_results[warp * kMaxReductions];
      __syncwarp();
      int at = 0;
      if (p.gram_count) {
        UNROLL
        for (int k = 0; k < K; ++k) {
          UNROLL
          for (int l = k; l < K; ++l) {
            if (l >= p.outputs) break;
            const float sum = warp_sum(gram[k * K - k * (k - 1) / 2 + l - k]);
            if (lane == 0) results[at] = sum;
            ++at;
          }
        }
      }
      if (sums == Sums::all && p.cross_count) {
        UNROLL
        for (int k = 0; k < K; ++k) {
          if (k >= p.outputs) break;
          UNROLL
          for (int j = 0; j < kTerms; ++j) {
            if (j < J ? j >= p.inputs : p.terms == p.inputs) continue;
            const float sum = warp_sum(cross[sums == Sums::all ? k * kTerms + j : 0]);
            if (lane == 0) results[at] = sum;
            ++at;
          }
        }
      }
      if (p.sums_count) {
        UNROLL
        for (int k = 0; k < K; ++k) {
          if (k >= p.outputs) break;
          const float sum = warp_sum(totals[k]);
          if (lane == 0) results[at] = sum;
          ++at;
        }
      }
      __syncwarp();
      for (int i = lane; i < at; i += 32) {
        if (p.partials) p.partials[(row * at + i) * p.units_per_row + part] = results[i];
        else write_reduction(p, row, i, results[i]);
      }
    }

    part += p.step_units;
    const int carry = part >= p.units_per_row ? 1 : 0;
    if (carry) part -= p.units_per_row;
    new_row = p.step_rows + carry != 0;
    row += p.step_rows + carry;
  }
}

constexpr int kFinishThreads = 256;

// Adds up a row's partials: thread t takes units t, t + 256, ...; then a fixed tree. Whatever the grid, the same order.
__global__ void __launch_bounds__(kFinishThreads) combine_finish_kernel(const __grid_constant__ Arguments p) {
  SHARED(double, sums, kFinishThreads);
  const int reductions = p.gram_count + p.cross_count + p.sums_count;
  const int t = static_cast<int>(threadIdx.x);
  for (int64_t item = blockIdx.x; item < p.rows * reductions; item += gridDim.x) {
    const float* partials = p.partials + item * p.units_per_row;
    double sum = 0.0;
    for (int64_t unit = t; unit < p.units_per_row; unit += kFinishThreads) sum += static_cast<double>(partials[unit]);
    sums[t] = sum;
    __syncthreads();
    for (int width = kFinishThreads / 2; width > 0; width /= 2) {
      if (t < width) sums[t] += sums[t + width];
      __syncthreads();
    }
    if (t == 0) write_reduction(p, item / reductions, static_cast<int>(item % reductions), static_cast<float>(sums[0]));
    __syncthreads();
  }
}

}  // namespace
}  // namespace combine_device
}  // namespace pyflowmap
