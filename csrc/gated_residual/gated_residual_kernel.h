// gated_residual_kernel.h - the kernels of gated_residual.cu. A warp takes a piece of a row, up to 32 * Width * Steps
// columns; backward, of all rows of a chunk, whose sums stay in its registers.
#pragma once
#include "common/column_sums_device.h"
#include "gated_residual/gated_residual.h"

namespace pyflowmap {
namespace gated_residual_device {

using namespace row_device;

constexpr int kWarpsPerBlock = 4, kThreads = 32 * kWarpsPerBlock;
enum Input { kX, kGate, kH, kDX, kDGate, kDH };
enum Gradient { kGGate, kGDGate };

struct ForwardArguments {
  RowShape shape;
  int64_t units, pieces;  // pieces of a row
  DeviceRows in[6], y, dy;
};

struct BackwardArguments {
  RowShape shape;
  int64_t units, pieces;
  DeviceRows gate, h, dgate, dh, gy, gdy, gh, gdh, vector[2];
  ColumnSums sums;
  float* partials;
};

namespace {

// Width elements per access; Steps accesses per operand in flight.
template <int Width, int Steps, bool Pair>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ ForwardArguments p) {
  constexpr int kInputs = Pair ? 6 : 3;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp; unit < p.units;
       unit += static_cast<int64_t>(gridDim.x) * kWarpsPerBlock) {
    const int64_t row = unit / p.pieces, first = (unit - row * p.pieces) * (32 * Width * Steps) + lane * Width;
    const RowIndex index = index_of(p.shape, row);
    uint32_t bits[kInputs][Steps][4];
    UNROLL
    for (int i = 0; i < kInputs; ++i) {
      const int64_t start = start_of(p.in[i], index);
      UNROLL
      for (int s = 0; s < Steps; ++s) {
        fetch<Width>(bits[i][s], p.in[i], start, first + s * 32 * Width, p.shape.columns);
      }
    }
    UNROLL
    for (int s = 0; s < Steps; ++s) {
      float in[kInputs][Width], y[Width];
      UNROLL
      for (int i = 0; i < kInputs; ++i) widen<Width>(in[i], bits[i][s], p.in[i].dtype);
      UNROLL
      for (int c = 0; c < Width; ++c) y[c] = in[kX][c] + in[kGate][c] * in[kH][c];
      put<Width>(p.y, start_of(p.y, index), first + s * 32 * Width, p.shape.columns, y);
      if constexpr (Pair) {
        UNROLL
        for (int c = 0; c < Width; ++c)
          y[c] = in[kDX][c] + (in[kDGate][c] * in[kH][c] + in[kGate][c] * in[kDH][c]);
        put<Width>(p.dy, start_of(p.dy, index), first + s * 32 * Width, p.shape.columns, y);
      }
    }
  }
}

template <int Width, bool Both>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ BackwardArguments p) {
  constexpr int kInputs = Both ? 6 : 3, kVectors = Both ? 2 : 1;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp; unit < p.units;
       unit += static_cast<int64_t>(gridDim.x) * kWarpsPerBlock) {
    const int64_t chunk = unit / p.pieces, column = (unit - chunk * p.pieces) * (32 * Width) + lane * Width;
    const RowRange range = rows_of_chunk(p.sums, chunk);
    float sum[kVectors][Width] = {};
    NO_UNROLL
    for (int64_t row = range.first; row < range.last; ++row) {
      const RowIndex index = index_of(p.shape, row);
      uint32_t bits[kInputs][4];
      const auto get = [&](int i, const DeviceRows& x) {
        fetch<Width>(bits[i], x, start_of(x, index), column, p.shape.columns);
      };
      float gate[Width], h[Width], gy[Width];
      get(0, p.gate);
      get(1, p.h);
      get(2, p.gy);
      if constexpr (Both) {
        get(3, p.dgate);
        get(4, p.dh);
        get(5, p.gdy);
      }
      widen<Width>(gate, bits[0], p.gate.dtype);
      widen<Width>(h, bits[1], p.h.dtype);
      widen<Width>(gy, bits[2], p.gy.dtype);
      float gh[Width], of_vector[kVectors][Width];
      UNROLL
      for (int c = 0; c < Width; ++c) {
        gh[c] = gate[c] * gy[c];
        of_vector[kGGate][c] = gy[c] * h[c];
      }
      if constexpr (Both) {
        float dgate[Width], dh[Width], gdy[Width];
        widen<Width>(dgate, bits[3], p.dgate.dtype);
        widen<Width>(dh, bits[4], p.dh.dtype);
        widen<Width>(gdy, bits[5], p.gdy.dtype);
        UNROLL
        for (int c = 0; c < Width; ++c) {
          gh[c] += dgate[c] * gdy[c];
          of_vector[kGGate][c] += gdy[c] * dh[c];
          of_vector[kGDGate][c] = gdy[c] * h[c];
          dh[c] = gate[c] * gdy[c];
        }
        put<Width>(p.gdh, start_of(p.gdh, index), column, p.shape.columns, dh);
      }
      put<Width>(p.gh, start_of(p.gh, index), column, p.shape.columns, gh);
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        if (p.sums.slot[v] < 0) {
          put<Width>(p.vector[v], start_of(p.vector[v], index), column, p.shape.columns, of_vector[v]);
        } else {
          UNROLL
          for (int c = 0; c < Width; ++c) sum[v][c] += of_vector[v][c];
        }
      }
    }
    put_sums(p.sums, p.partials, chunk, column, p.shape.columns, sum);
  }
}

}  // namespace
}  // namespace gated_residual_device
}  // namespace pyflowmap
