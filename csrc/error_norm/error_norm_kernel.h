// error_norm_kernel.h - the kernels of error_norm.cu: the sum over a unit of a row, and the sum of a row's partials.
//
// A block takes a unit: up to 2048 consecutive elements of one sample, 16 to a thread. All operands of an access are in
// flight before the first conversion waits for one.
#pragma once
#include "common/launch.h"
#include "common/row_device.h"
#include "error_norm/error_norm.h"

namespace pyflowmap {
namespace error_norm_device {

using namespace row_device;

constexpr int kThreads = 128, kFinishThreads = 256;
constexpr int kColumnsPerUnit = 2048;
constexpr int kTerms = ErrorNorm::kMostTerms;

struct Arguments {
  int64_t rows, columns, units, units_per_row;
  int terms;
  DeviceRows k[kTerms], x, y;
  float c[kTerms], rtol, atol;
  const double* factor;
  float* sums;
  float* partials;  // [rows, units_per_row]; null where a unit is a whole row
};

namespace {

// Width elements per access: 4, or 8 where all operands are 16 bits wide.
template <int Width>
__global__ void __launch_bounds__(kThreads, 4) error_norm_kernel(const __grid_constant__ Arguments p) {
  SHARED(float, space, 32);
  for (int64_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const int64_t row = p.units_per_row == 1 ? unit : unit / p.units_per_row, part = unit - row * p.units_per_row;
    const int64_t begin = part * kColumnsPerUnit, next = begin + kColumnsPerUnit;
    const int64_t end = next < p.columns ? next : p.columns;
    const float factor = p.factor ? static_cast<float>(p.factor[row]) : 1.0f;
    float sums[1] = {};
    if (factor != 0.0f) {
      for (int64_t column = begin + static_cast<int64_t>(threadIdx.x) * Width; column < end;
           column += kThreads * Width) {
        uint32_t bits[kTerms + 2][4];
        UNROLL
        for (int j = 0; j < kTerms; ++j) {
          if (j < p.terms) fetch<Width>(bits[j], p.k[j], row * p.k[j].stride[2], column, end);
        }
        fetch<Width>(bits[kTerms], p.x, row * p.x.stride[2], column, end);
        fetch<Width>(bits[kTerms + 1], p.y, row * p.y.stride[2], column, end);
        float error[Width] = {}, v[Width], largest[Width];
        UNROLL
        for (int j = 0; j < kTerms; ++j) {
          if (j >= p.terms) continue;
          widen<Width>(v, bits[j], p.k[j].dtype);
          UNROLL
          for (int i = 0; i < Width; ++i) error[i] += p.c[j] * v[i];
        }
        widen<Width>(largest, bits[kTerms], p.x.dtype);
        widen<Width>(v, bits[kTerms + 1], p.y.dtype);
        UNROLL
        for (int i = 0; i < Width; ++i) {
          const float a = fabsf(largest[i]), b = fabsf(v[i]);
          const float m = a > b || a != a ? a : b;  // NaN wins, as in torch.maximum
          // Past the end of the row the operands are 0, and so is this.
          const float ratio = factor * error[i] / (p.atol + p.rtol * m);
          sums[0] += ratio * ratio;
        }
      }
    }
    block_sums(sums, space);
    if (threadIdx.x == 0) (p.partials ? p.partials : p.sums)[unit] = sums[0];
  }
}

// Thread t takes units t, t + 256, ...; then a fixed tree. Whatever the grid, the same order.
__global__ void __launch_bounds__(kFinishThreads) error_norm_finish_kernel(const __grid_constant__ Arguments p) {
  SHARED(double, sums, kFinishThreads);
  const int t = static_cast<int>(threadIdx.x);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float* partials = p.partials + row * p.units_per_row;
    double sum = 0.0;
    for (int64_t unit = t; unit < p.units_per_row; unit += kFinishThreads) sum += static_cast<double>(partials[unit]);
    sums[t] = sum;
    __syncthreads();
    for (int width = kFinishThreads / 2; width > 0; width /= 2) {
      if (t < width) sums[t] += sums[t + width];
      __syncthreads();
    }
    if (t == 0) p.sums[row] = static_cast<float>(sums[0]);
    __syncthreads();
  }
}

}  // namespace
}  // namespace error_norm_device
}  // namespace pyflowmap
