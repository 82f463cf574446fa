// combine.cu - row-wise linear combinations of up to 8 tensors and their inner products, in one pass.
//   Y[k,r,:] = sum_j C[k,j,r] X[j,r,:]        contract: combine.h
//
// A warp takes a unit: up to 1024 consecutive elements of one row (more, where reductions would leave too many
// partials). It forms the row's coefficients once, then walks the unit with every load of a step in flight before the
// first is used. A lane reads all inputs of its elements before it writes any output of them, which is what makes
// "an output may be exactly an input" safe.
#include "combine/combine_device.h"

#include <type_traits>

namespace pyflowmap {
namespace combine_device {
namespace {

enum class Sums { none, gram, all };  // gram: the Gram matrix and the row sums; all: the cross Gram as well

// ---- kernel ---------------------------------------------------------------------------------------------------------

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
  constexpr int kGram = kSums ? K * (K + 1) / 2 : 1, kCross = sums == Sums::all ? K * kTerms : 1, kTotals = kSums ? K : 1;
  constexpr int kStep = 32 * Width, kDraw = Width < 4 ? Width : 4;

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  SHARED(float, all_a, kWarpsPerBlock * kFactors);
  SHARED(float, all_b, (kExtras ? kWarpsPerBlock * kFactors : 1));
  SHARED(float, all_results, (kSums ? kWarpsPerBlock * kMaxReductions : 1));
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
      const auto combine = [&](float(&y)[Steps][Width], int k) {
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

// ---- every instantiation, cheapest first: the first that fits is taken -----------------------------------------------

template <class Args> struct Variant {
  int inputs, outputs, width;  // bounds; outputs are bounded only where their sums are in registers
  Sums sums;
  void (*kernel)(Args);
};

constexpr Variant<Arguments> kPlain[] = {
    // J  K  width                       J  K  W  steps          blocks
    {2, 8, 4, Sums::none, combine_kernel<Arguments, 2, 8, 4, 4, Sums::none, 4>},
    {4, 8, 4, Sums::none, combine_kernel<Arguments, 4, 8, 4, 2, Sums::none, 4>},
    {8, 8, 4, Sums::none, combine_kernel<Arguments, 8, 8, 4, 1, Sums::none, 4>},
    {4, 8, 8, Sums::none, combine_kernel<Arguments, 4, 8, 8, 1, Sums::none, 6>},
    {8, 8, 8, Sums::none, combine_kernel<Arguments, 8, 8, 8, 1, Sums::none, 4>},
    {4, 2, 4, Sums::gram, combine_kernel<Arguments, 4, 2, 4, 2, Sums::gram, 4>},
};

constexpr Variant<ArgumentsWithExtras> kWithExtras[] = {
    {4, 8, 4, Sums::none, combine_kernel<ArgumentsWithExtras, 4, 8, 4, 1, Sums::none, 4>},
    {8, 8, 4, Sums::none, combine_kernel<ArgumentsWithExtras, 8, 8, 4, 1, Sums::none, 3>},
    {8, 2, 4, Sums::gram, combine_kernel<ArgumentsWithExtras, 8, 2, 4, 1, Sums::gram, 3>},
    {4, 2, 4, Sums::all, combine_kernel<ArgumentsWithExtras, 4, 2, 4, 1, Sums::all, 4>},
    {8, 8, 4, Sums::all, combine_kernel<ArgumentsWithExtras, 8, 8, 2, 1, Sums::all, 2>},
};

// ---- launcher -------------------------------------------------------------------------------------------------------

constexpr int64_t kColumnsPerUnit = 1024;
constexpr int64_t kMaxPartials = 4096;      // per row: what the last kernel adds up with one block
constexpr int64_t kBlocksPerMultiprocessor = 64;  // several rounds of resident blocks even out the last one

int64_t columns_per_unit(const CombineParams& p) {
  if (!p.gram && !p.cross && !p.sums) return kColumnsPerUnit;
  const int64_t least = (p.columns + kMaxPartials - 1) / kMaxPartials;
  return least <= kColumnsPerUnit ? kColumnsPerUnit : (least + kColumnsPerUnit - 1) / kColumnsPerUnit * kColumnsPerUnit;
}

int64_t units_per_row(const CombineParams& p) {
  const int64_t size = columns_per_unit(p);
  return p.columns == 0 ? 1 : (p.columns + size - 1) / size;
}

// Nothing in the call depends on the row, and rows follow one another: one long row does the same work.
bool rows_are_one(const CombineParams& p) {
  if (p.gram || p.cross || p.sums || p.noise.present || p.mask.data) return false;
  for (int j = 0; j < p.inputs; ++j) {
    if (p.x[j].row_stride != p.columns) return false;
  }
  for (int k = 0; k < p.outputs; ++k) {
    if (p.y[k].data && p.y[k].row_stride != p.columns) return false;
    for (int j = 0; j < p.inputs; ++j) {
      if (p.a[k][j].vector) return false;
    }
  }
  return true;
}

bool aligned(const Operand& x, int64_t rows, int64_t bytes) {
  const bool starts = reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(bytes) == 0;
  return starts && (rows <= 1 || x.row_stride * size_of(x.dtype) % bytes == 0);
}

// 8 elements per access where all operands are 16 bits wide and lie on 16 bytes.
int width_of(const CombineParams& p, int64_t rows) {
  if (p.gram || p.cross || p.sums || p.noise.present || p.mask.data) return 4;
  for (int j = 0; j < p.inputs; ++j) {
    if (size_of(p.x[j].dtype) != 2 || !aligned(p.x[j], rows, 16)) return 4;
  }
  for (int k = 0; k < p.outputs; ++k) {
    if (p.y[k].data && (size_of(p.y[k].dtype) != 2 || !aligned(p.y[k], rows, 16))) return 4;
  }
  return 8;
}

Stream2D stream_of(const Operand& x, int64_t rows, int width) {
  return {x.data, x.row_stride, x.dtype, aligned(x, rows, width * size_of(x.dtype))};
}

void set_factors(Factors* to, const CombineParams& p, const Coefficient (&from)[kMaxOutputs][kMaxTerms]) {
  for (int k = 0; k < p.outputs; ++k) {
    for (int j = 0; j < kMaxTerms; ++j) {
      const Coefficient& c = from[k][j];
      const int i = k * kMaxTerms + j;
      to->scalar[i] = c.scalar;
      to->vector[i] = c.vector;
      to->stride[i] = c.stride;
      to->is_double[i] = c.vector_is_double;
    }
  }
}

void set_arguments(Arguments* to, const CombineParams& p, int width) {
  to->inputs = p.inputs;
  to->outputs = p.outputs;
  to->terms = p.inputs + (p.noise.present ? 1 : 0);
  to->rows = p.rows;
  to->columns = p.columns;
  to->columns_per_unit = static_cast<int>(columns_per_unit(p));
  to->units_per_row = static_cast<int>(units_per_row(p));
  for (int j = 0; j < p.inputs; ++j) to->x[j] = stream_of(p.x[j], p.rows, width);
  for (int k = 0; k < p.outputs; ++k) {
    to->y[k] = stream_of(p.y[k], p.rows, width);
    to->clamp[k] = p.clamp[k];
    to->low[k] = static_cast<float>(p.low[k]);
    to->high[k] = static_cast<float>(p.high[k]);
  }
  set_factors(&to->a, p, p.a);
  to->gram = static_cast<float*>(p.gram);
  to->cross = static_cast<float*>(p.cross);
  to->sums = static_cast<float*>(p.sums);
  to->gram_count = p.gram ? p.outputs * (p.outputs + 1) / 2 : 0;
  to->cross_count = p.cross ? p.outputs * to->terms : 0;
  to->sums_count = p.sums ? p.outputs : 0;
  to->partials = combine_workspace_bytes(p) > 0 ? static_cast<float*>(p.workspace) : nullptr;
}

template <class Args, size_t N>
Status start(const Variant<Args> (&variants)[N], Args& arguments, int width, Sums sums, int multiprocessors, Stream stream) {
  const int64_t units = arguments.rows * arguments.units_per_row;
  const int64_t wanted = (units + kWarpsPerBlock - 1) / kWarpsPerBlock, most = multiprocessors * kBlocksPerMultiprocessor;
  const int64_t blocks = wanted < most ? wanted : most;
  arguments.step_rows = blocks * kWarpsPerBlock / arguments.units_per_row;
  arguments.step_units = static_cast<int>(blocks * kWarpsPerBlock % arguments.units_per_row);
  for (const Variant<Args>& variant : variants) {
    if (variant.width != width || variant.inputs < arguments.inputs || variant.outputs < arguments.outputs) continue;
    if (variant.sums != sums) continue;
    return LAUNCH(variant.kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, arguments);
  }
  return {1, "combine: no kernel for this call"};
}

}  // namespace
}  // namespace combine_device

size_t combine_workspace_bytes(const CombineParams& p) {
  const int terms = p.inputs + (p.noise.present ? 1 : 0);
  const int64_t reductions = (p.gram ? p.outputs * (p.outputs + 1) / 2 : 0) + (p.cross ? p.outputs * terms : 0) + (p.sums ? p.outputs : 0);
  const int64_t units = combine_device::units_per_row(p);
  return reductions == 0 || units == 1 ? 0 : static_cast<size_t>(p.rows * reductions * units) * sizeof(float);
}

Status combine_cuda(const CombineParams& params, int device, void* stream_pointer) {
  using namespace combine_device;
  CombineParams p = params;
  if (p.rows == 0 || p.outputs == 0) return {};
  for (int j = 0; j < p.inputs; ++j) {
    if (p.x[j].dtype == DType::f64) return {1, "combine: float64 is computed on the CPU only"};
  }
  for (int k = 0; k < p.outputs; ++k) {
    if (p.y[k].dtype == DType::f64) return {1, "combine: float64 is computed on the CPU only"};
  }
  if (rows_are_one(p)) {
    p.columns *= p.rows;
    p.rows = 1;
  }
  const bool reduces = p.gram || p.cross || p.sums;
  if (p.columns == 0 && !reduces) return {};
  if (combine_workspace_bytes(p) > 0 && !p.workspace) return {1, "combine: the reductions need a workspace"};

  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;
  const auto stream = static_cast<Stream>(stream_pointer);

  const int width = width_of(p, p.rows);
  const Sums sums = p.cross ? Sums::all : reduces ? Sums::gram : Sums::none;
  const bool extras = p.noise.present || p.mask.data || p.cross || (reduces && (p.inputs > 4 || p.outputs > 2));
  ArgumentsWithExtras arguments = {};
  set_arguments(&arguments, p, width);
  Status status;
  if (extras) {
    set_factors(&arguments.b, p, p.b);
    arguments.noise = p.noise;
    arguments.mask = p.mask;
    // A wide Gram matrix without a cross Gram runs on the kernel that has both.
    const Sums kept = sums == Sums::gram && p.outputs > 2 ? Sums::all : sums;
    status = start(kWithExtras, arguments, width, kept, count, stream);
  } else {
    status = start(kPlain, static_cast<Arguments&>(arguments), width, sums, count, stream);
  }
  if (!status.ok() || !arguments.partials) return status;

  const int64_t items = p.rows * (arguments.gram_count + arguments.cross_count + arguments.sums_count);
  const int64_t most = count * kBlocksPerMultiprocessor;
  const auto blocks = static_cast<unsigned>(items < most ? items : most);
  return LAUNCH(combine_finish_kernel, dim3(blocks), dim3(kFinishThreads), 0, stream, static_cast<const Arguments&>(arguments));
}

}  // namespace pyflowmap
