// norm_modulate_kernel.h - the kernels of norm_modulate.cu. Threads of one warp, or of one block where the row is longer,
// hold a row in registers from its means to its results; the backward pass walks the rows of a chunk, whose sums stay in
// registers too. Rows that fit in no block are read once more per walk.
#pragma once
#include "common/column_sums_device.h"
#include "norm_modulate/norm_modulate.h"

namespace pyflowmap {
namespace norm_modulate_device {

using namespace row_device;

constexpr int kMaxWarps = 12;  // of a block: 168 registers for a thread
constexpr int kMostSums = 5;
constexpr int kVectors = NormModulateBackward::kVectors;

struct Common {
  RowShape shape;
  int64_t rows, groups;  // groups of threads in the grid, a row each at a time
  int warps_per_row;     // 1, or all of the block
  bool layer;
  float eps, per;  // 1 / columns
};

struct ForwardArguments : Common { DeviceRows x, scale, shift, dx, dscale, dshift, y, dy; };

struct BackwardArguments : Common {
  DeviceRows x, scale, dx, dscale, gy, gdy, gx, gdx, vector[kVectors];
  ColumnSums sums;
  float* partials;
};

namespace {

// The thread's place: its group, its first column, the columns from one of its accesses to the next.
struct Place {
  int64_t group, first, step;
  bool block;

  template <int N> __device__ __forceinline__ void add_up(float (&sums)[N], float* space) const {
    if (block) block_sums(sums, space);
    else warp_sums(sums);
  }
};

template <int Width> __device__ __forceinline__ Place place_of_thread(const Common& p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  Place place;
  place.block = p.warps_per_row > 1;
  const int warps = static_cast<int>(blockDim.x) / 32;
  place.group = place.block ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * warps + warp;
  place.first = (place.block ? static_cast<int>(threadIdx.x) : lane) * Width;
  place.step = p.warps_per_row * 32 * Width;
  return place;
}

// f(s, column) for each of the thread's accesses to a row: Steps of them in registers, or any number of them.
template <int Steps, bool Resident, class F>
__device__ __forceinline__ void each(const Place& place, int64_t columns, const F& f) {
  if constexpr (Resident) {
    UNROLL
    for (int s = 0; s < Steps; ++s) f(s, place.first + s * place.step);
  } else {
    NO_UNROLL
    for (int64_t column = place.first; column < columns; column += place.step) f(0, column);
  }
}

template <int Width>
__device__ __forceinline__ void get(float (&to)[Width], const DeviceRows& x, int64_t start, int64_t column,
                                    int64_t columns) {
  uint32_t bits[4];
  fetch<Width>(bits, x, start, column, columns);
  widen<Width>(to, bits, x.dtype);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Width elements per access, Steps accesses per operand and row in registers (1 where rows are read again).
template <int Width, int Steps, bool Pair, bool Resident>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) forward_kernel(const __grid_constant__ ForwardArguments p) {
  constexpr int kRead = Pair ? 2 : 1;  // x, dx
  SHARED(float, space, 32 * kMostSums);
  const Place place = place_of_thread<Width>(p);
  const int64_t columns = p.shape.columns;
  for (int64_t row = place.group; row < p.rows; row += p.groups) {
    const RowIndex index = index_of(p.shape, row);
    const int64_t starts[2] = {start_of(p.x, index), start_of(p.dx, index)};
    float in[kRead][Steps][Width];
    const auto& x = in[0];
    const auto& dx = in[kRead - 1];
    const auto again = [&](int64_t column) {
      if constexpr (!Resident) {
        get<Width>(in[0][0], p.x, starts[0], column, columns);
        if constexpr (Pair) get<Width>(in[1][0], p.dx, starts[1], column, columns);
      }
    };
    if constexpr (Resident) {
      UNROLL
      for (int i = 0; i < kRead; ++i) {
        uint32_t bits[Steps][4];
        const DeviceRows& from = i == 0 ? p.x : p.dx;
        UNROLL
        for (int s = 0; s < Steps; ++s) fetch<Width>(bits[s], from, starts[i], place.first + s * place.step, columns);
        UNROLL
        for (int s = 0; s < Steps; ++s) widen<Width>(in[i][s], bits[s], from.dtype);
      }
    }

    float mean[kRead] = {};
    if (p.layer) {
      each<Steps, Resident>(place, columns, [&](int s, int64_t column) {
        again(column);
        UNROLL
        for (int c = 0; c < Width; ++c) {
          UNROLL
          for (int i = 0; i < kRead; ++i) mean[i] += in[i][s][c];  // 0 past the end
        }
      });
      place.add_up(mean, space);
      UNROLL
      for (int i = 0; i < kRead; ++i) mean[i] *= p.per;
    }
    float sum[kRead] = {};
    each<Steps, Resident>(place, columns, [&](int s, int64_t column) {
      again(column);
      UNROLL
      for (int c = 0; c < Width; ++c) {
        const float left = column + c < columns ? x[s][c] - mean[0] : 0.0f;
        sum[0] += left * left;
        if constexpr (Pair) sum[1] += left * (dx[s][c] - mean[1]);
      }
    });
    place.add_up(sum, space);
    const float r = 1.0f / sqrtf(sum[0] * p.per + p.eps), slope = Pair ? sum[kRead - 1] * r * p.per : 0.0f;

    const int64_t at_scale = start_of(p.scale, index), at_shift = start_of(p.shift, index);
    each<Steps, Resident>(place, columns, [&](int s, int64_t column) {
      again(column);
      float factor[Width], y[Width];
      get<Width>(factor, p.scale, at_scale, column, columns);
      get<Width>(y, p.shift, at_shift, column, columns);
      UNROLL
      for (int c = 0; c < Width; ++c) {
        factor[c] += 1.0f;
        y[c] += (x[s][c] - mean[0]) * r * factor[c];
      }
      put<Width>(p.y, start_of(p.y, index), column, columns, y);
      if constexpr (Pair) {
        float dscale[Width];
        get<Width>(dscale, p.dscale, start_of(p.dscale, index), column, columns);
        get<Width>(y, p.dshift, start_of(p.dshift, index), column, columns);
        UNROLL
        for (int c = 0; c < Width; ++c) {
          const float normal = (x[s][c] - mean[0]) * r;
          const float dnormal = r * ((dx[s][c] - mean[1]) - normal * slope);
          y[c] += dnormal * factor[c] + normal * dscale[c];
        }
        put<Width>(p.dy, start_of(p.dy, index), column, columns, y);
      }
    });
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Without tangents dx, dscale and gdy are zero, and so is what they lead to.
template <int Width, int Steps, bool Both, bool Resident>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) backward_kernel(const __grid_constant__ BackwardArguments p) {
  using P = NormModulateBackward;
  constexpr int kSums = Both ? kVectors : 2;  // kScale, kShift come first
  enum { kX, kGY, kFactor, kDX, kGDY, kDScale };
  constexpr int kRead = Both ? 6 : 3;
  SHARED(float, space, 32 * kMostSums);
  const Place place = place_of_thread<Width>(p);
  const int64_t columns = p.shape.columns;
  const DeviceRows* const operands[6] = {&p.x, &p.gy, &p.scale, &p.dx, &p.gdy, &p.dscale};
  for (int64_t chunk = place.group; chunk < p.sums.chunks; chunk += p.groups) {
    const RowRange range = rows_of_chunk(p.sums, chunk);
    float total[kSums][Steps][Width] = {};
    NO_UNROLL
    for (int64_t row = range.first; row < range.last; ++row) {
      const RowIndex index = index_of(p.shape, row);
      float in[kRead][Steps][Width];
      const auto read_all = [&](int s, int64_t column) {
        uint32_t bits[kRead][4];
        UNROLL
        for (int i = 0; i < kRead; ++i) {
          fetch<Width>(bits[i], *operands[i], start_of(*operands[i], index), column, columns);
        }
        UNROLL
        for (int i = 0; i < kRead; ++i) widen<Width>(in[i][s], bits[i], operands[i]->dtype);
        UNROLL
        for (int c = 0; c < Width; ++c) in[kFactor][s][c] += 1.0f;
      };
      const auto again = [&](int64_t column) {
        if constexpr (!Resident) read_all(0, column);
      };
      // The cotangents of n and dn.
      const auto p_of = [&](int s, int c) {
        float value = in[kGY][s][c] * in[kFactor][s][c];
        if constexpr (Both) value += in[kGDY][s][c] * in[kDScale][s][c];
        return value;
      };
      const auto q_of = [&](int s, int c) {
        if constexpr (Both) return in[kGDY][s][c] * in[kFactor][s][c];
        else return 0.0f;
      };
      const auto dx_of = [&](int s, int c) {
        if constexpr (Both) return in[kDX][s][c];
        else return 0.0f;
      };
      if constexpr (Resident) {
        UNROLL
        for (int s = 0; s < Steps; ++s) read_all(s, place.first + s * place.step);
      }

      constexpr int kMeans = Both ? 4 : 2;  // x, p; dx, q
      float mean[kMeans] = {};
      if (p.layer) {
        each<Steps, Resident>(place, columns, [&](int s, int64_t column) {
          again(column);
          UNROLL
          for (int c = 0; c < Width; ++c) {
            mean[0] += in[kX][s][c];
            mean[1] += p_of(s, c);
            if constexpr (Both) {
              mean[2] += dx_of(s, c);
              mean[3] += q_of(s, c);
            }
          }
        });
        place.add_up(mean, space);
        UNROLL
        for (int i = 0; i < kMeans; ++i) mean[i] *= p.per;
      }
      constexpr int kProducts = Both ? kMostSums : 2;
      float sum[kProducts] = {};
      each<Steps, Resident>(place, columns, [&](int s, int64_t column) {
        again(column);
        UNROLL
        for (int c = 0; c < Width; ++c) {
          const bool inside = column + c < columns;
          const float left = inside ? in[kX][s][c] - mean[0] : 0.0f;
          sum[0] += left * left;
          sum[1] += left * (p_of(s, c) - mean[1]);
          if constexpr (Both) {
            const float d_left = inside ? dx_of(s, c) - mean[2] : 0.0f, q = q_of(s, c) - mean[3];
            sum[2] += left * d_left;
            sum[3] += left * q;
            sum[4] += d_left * q;
          }
        }
      });
      place.add_up(sum, space);
      const float r = 1.0f / sqrtf(sum[0] * p.per + p.eps), scaled = r * p.per;
      const float of_p = sum[1] * scaled;
      float of_x = 0.0f, of_q = 0.0f, joint = 0.0f;
      if constexpr (Both) {
        of_x = sum[2] * scaled;
        of_q = sum[3] * scaled;
        joint = sum[4] * p.per - of_q * of_x;
      }
      const float from_q = r * of_x, from_x = r * of_q, from_n = r * r * joint;

      each<Steps, Resident>(place, columns, [&](int s, int64_t column) {
        again(column);
        float gx[Width], gdx[Width], of_vector[kSums][Width];
        UNROLL
        for (int c = 0; c < Width; ++c) {
          const float normal = (in[kX][s][c] - mean[0]) * r, gy = in[kGY][s][c];
          gx[c] = r * ((p_of(s, c) - mean[1]) - normal * of_p);
          of_vector[P::kScale][c] = gy * normal;
          of_vector[P::kShift][c] = gy;
          if constexpr (Both) {
            const float gdy = in[kGDY][s][c];
            const float dnormal = r * ((dx_of(s, c) - mean[2]) - normal * of_x);
            gdx[c] = r * ((q_of(s, c) - mean[3]) - normal * of_q);
            gx[c] = gx[c] - from_q * gdx[c] - from_x * dnormal - from_n * normal;
            of_vector[P::kScale][c] += gdy * dnormal;
            of_vector[P::kDScale][c] = gdy * normal;
            of_vector[P::kDShift][c] = gdy;
          }
        }
        put<Width>(p.gx, start_of(p.gx, index), column, columns, gx);
        if constexpr (Both) put<Width>(p.gdx, start_of(p.gdx, index), column, columns, gdx);
        UNROLL
        for (int v = 0; v < kSums; ++v) {
          if (p.sums.slot[v] < 0) {
            put<Width>(p.vector[v], start_of(p.vector[v], index), column, columns, of_vector[v]);
          } else {
            UNROLL
            for (int c = 0; c < Width; ++c) total[v][s][c] += of_vector[v][c];
          }
        }
        // A chunk is one row where a thread cannot hold its columns.
        if constexpr (!Resident) {
          put_sums(p.sums, p.partials, chunk, column, columns, of_vector);
        }
      });
    }
    if constexpr (Resident) {
      UNROLL
      for (int s = 0; s < Steps; ++s) {
        float sums[kSums][Width];
        UNROLL
        for (int v = 0; v < kSums; ++v) {
          UNROLL
          for (int c = 0; c < Width; ++c) sums[v][c] = total[v][s][c];
        }
        put_sums(p.sums, p.partials, chunk, place.first + s * place.step, columns, sums);
      }
    }
  }
}

}  // namespace
}  // namespace norm_modulate_device
}  // namespace pyflowmap
