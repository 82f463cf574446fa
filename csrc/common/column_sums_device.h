// column_sums_device.h - adds up the partials of column_sums.h on the device: one small kernel after the one that left
// them.
#pragma once
#include "common/column_sums.h"
#include "common/row_device.h"

namespace pyflowmap {
namespace row_device {

// A thread's sums over a chunk, into the partials.
template <int N, int Width>
static __device__ __forceinline__ void put_sums(const ColumnSums& sums, float* partials, int64_t chunk, int64_t column,
                                                int64_t columns, const float (&from)[N][Width]) {
  UNROLL
  for (int i = 0; i < N; ++i) {
    if (sums.slot[i] < 0) continue;
    float* to = partials + (chunk * sums.slots + sums.slot[i]) * columns + column;
    UNROLL
    for (int c = 0; c < Width; ++c) {
      if (column + c < columns) to[c] = from[i][c];
    }
  }
}

struct FinishArguments {
  RowShape shape;
  ColumnSums sums;
  DeviceRows to[ColumnSums::kMost];
  const float* partials;
};

constexpr int kFinishWarps = 8;  // each adds up every eighth chunk of 32 columns

static __global__ void __launch_bounds__(32 * kFinishWarps) finish_sums(const __grid_constant__ FinishArguments p) {
  SHARED(float, parts, 32 * kFinishWarps);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int which = static_cast<int>(blockIdx.y);
  if (p.sums.slot[which] < 0 || !p.to[which].data) return;
  const int64_t chunks = p.sums.shares[which] / p.sums.period * p.sums.per_period;
  const int64_t segments = p.sums.rows / p.sums.shares[which], blocks = (p.shape.columns + 31) / 32;
  for (int64_t unit = blockIdx.x; unit < segments * blocks; unit += gridDim.x) {
    const int64_t segment = unit / blocks, column = unit % blocks * 32 + lane;
    float sum = 0.0f;
    if (column < p.shape.columns) {
      for (int64_t c = warp; c < chunks; c += kFinishWarps) {
        sum += p.partials[((segment * chunks + c) * p.sums.slots + p.sums.slot[which]) * p.shape.columns + column];
      }
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < p.shape.columns) {
      for (int w = 1; w < kFinishWarps; ++w) sum += parts[w * 32 + lane];
      const RowIndex index = index_of(p.shape, segment * p.sums.shares[which]);
      put_one(p.to[which], start_of(p.to[which], index) + column, sum);
    }
    __syncthreads();
  }
}

inline Status finish_column_sums(const FinishArguments& p, int multiprocessors, Stream stream) {
  const int64_t blocks = (p.shape.columns + 31) / 32;
  int64_t most = 0;
  for (int i = 0; i < ColumnSums::kMost; ++i) {
    if (p.sums.slot[i] < 0 || !p.to[i].data) continue;
    const int64_t units = p.sums.rows / p.sums.shares[i] * blocks;
    most = units > most ? units : most;
  }
  if (most == 0) return {};
  const int64_t enough = multiprocessors * 16;
  const dim3 grid(static_cast<unsigned>(most < enough ? most : enough), ColumnSums::kMost);
  return LAUNCH(finish_sums, grid, dim3(32 * kFinishWarps), 0, stream, p);
}

}  // namespace row_device
}  // namespace pyflowmap
