// activation_kernel.h - the kernel of activation.cu: one pass over a unit of a row.
//
// A warp takes a unit: up to 512 consecutive elements of one row. A lane loads its elements of every operand, the bits
// as they are, before the first conversion waits for one. The kind and the storage types are looked up at run time: they
// are the same for the whole grid, and memory is what limits it.
#pragma once
#include "activation/activation_math.h"
#include "common/launch.h"
#include "common/row_device.h"

namespace pyflowmap {
namespace activation_device {

constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = 32 * kWarpsPerBlock;
constexpr int kColumnsPerUnit = 512;
constexpr int kInputs = 6, kOutputs = 4;

using namespace row_device;

struct Arguments {
  RowShape shape;
  int64_t units, units_per_row;
  ActivationKind kind;
  bool tangents;             // dy, or the gradients through it, are wanted
  DeviceRows in[kInputs];    // a, b, da, db, gy, gdy
  DeviceRows out[kOutputs];  // y, dy; or ga, gb, gda, gdb
};

namespace {

// ---- kernel -----------------------------------------------------------------------------------------------------------

// Which of a, b, da, db, gy, gdy a kernel has, and which results; each of them may still be missing.
template <bool gated, bool backward> __device__ constexpr bool reads(int s) {
  return (gated || s == 0 || s == 2 || s >= 4) && (backward || s < 4);
}
template <bool gated, bool backward> __device__ constexpr bool writes(int s) {
  return backward ? gated || s % 2 == 0 : s < 2;
}

// x[s] holds the operands and, afterwards, in its first places the results.
template <ActivationKind kind, bool gated, bool backward, int Width>
__device__ __forceinline__ void evaluate(float (&x)[kInputs][Width], bool tangents) {
  constexpr bool cuts = kind == ActivationKind::relu;
  UNROLL
  for (int i = 0; i < Width; ++i) {
    const Element<float> e = {x[0][i], x[1][i], x[2][i], x[3][i], x[4][i], x[5][i]};
    const Jet<float> j = jet<kind>(e.a);
    Results<float> r;
    if constexpr (!backward) r = forward_of<gated>(j, e, cuts);
    else r = tangents ? backward_of<gated, true>(j, e, cuts) : backward_of<gated, false>(j, e, cuts);
    UNROLL
    for (int k = 0; k < kOutputs; ++k) x[k][i] = r.v[k];
  }
}

template <bool gated, bool backward, int Width>
__global__ void __launch_bounds__(kThreads, Width == 4 ? 5 : 4) activation_kernel(const __grid_constant__ Arguments p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp; unit < p.units; unit += step) {
    const int64_t line = p.units_per_row == 1 ? unit : unit / p.units_per_row, part = unit - line * p.units_per_row;
    const RowIndex index = index_of(p.shape, line);
    const int64_t begin = part * kColumnsPerUnit, next = begin + kColumnsPerUnit;
    const int64_t end = next < p.shape.columns ? next : p.shape.columns;
    for (int64_t column = begin + lane * Width; column < end; column += 32 * Width) {
      uint32_t bits[kInputs][4];
      float x[kInputs][Width];
      UNROLL
      for (int s = 0; s < kInputs; ++s) {
        if (reads<gated, backward>(s)) fetch<Width>(bits[s], p.in[s], start_of(p.in[s], index), column, end);
      }
      UNROLL
      for (int s = 0; s < kInputs; ++s) {
        UNROLL
        for (int e = 0; e < Width; ++e) x[s][e] = 0.0f;
        if (reads<gated, backward>(s)) widen<Width>(x[s], bits[s], p.in[s].dtype);
      }
      switch (p.kind) {
        case ActivationKind::silu: evaluate<ActivationKind::silu, gated, backward>(x, p.tangents); break;
        case ActivationKind::gelu: evaluate<ActivationKind::gelu, gated, backward>(x, p.tangents); break;
        case ActivationKind::gelu_tanh: evaluate<ActivationKind::gelu_tanh, gated, backward>(x, p.tangents); break;
        case ActivationKind::relu: evaluate<ActivationKind::relu, gated, backward>(x, p.tangents); break;
        case ActivationKind::sigmoid: evaluate<ActivationKind::sigmoid, gated, backward>(x, p.tangents); break;
        default: evaluate<ActivationKind::tanh, gated, backward>(x, p.tangents); break;
      }
      UNROLL
      for (int s = 0; s < kOutputs; ++s) {
        if (writes<gated, backward>(s)) put<Width>(p.out[s], start_of(p.out[s], index), column, end, x[s]);
      }
    }
  }
}

}  // namespace
}  // namespace activation_device
}  // namespace pyflowmap
