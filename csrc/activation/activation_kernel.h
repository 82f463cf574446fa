// activation_kernel.h - the kernel of activation.cu: one pass over a unit of a row.
//
// A warp takes a unit: up to 512 consecutive elements of one row. A lane loads its elements of every operand, the bits
// as they are, before the first conversion waits for one. The kind and the storage types are looked up at run time: they
// are the same for the whole grid, and memory is what limits it.
#pragma once
#include "activation/activation_math.h"
#include "common/launch.h"

namespace pyflowmap {
namespace activation_device {

constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = 32 * kWarpsPerBlock;
constexpr int kColumnsPerUnit = 512;
constexpr int kInputs = 6, kOutputs = 4;

struct DeviceRows {
  void* data;
  int64_t stride[3];
  DType dtype;
  bool aligned;  // every full vector starts at a multiple of its own size
};

struct Arguments {
  int64_t outer1, outer2, columns, units, units_per_row;
  ActivationKind kind;
  bool tangents;             // dy, or the gradients through it, are wanted
  DeviceRows in[kInputs];    // a, b, da, db, gy, gdy
  DeviceRows out[kOutputs];  // y, dy; or ga, gb, gda, gdb
};

namespace {

// ---- Width elements of one operand: 4 of any type, or 8 of a 16-bit type ----------------------------------------------

template <int Width>
__device__ __forceinline__ void read(uint32_t (&bits)[4], const DeviceRows& x, int64_t at, int valid) {
  if (Width == 4 && x.dtype == DType::f32) {
    const auto* from = static_cast<const uint32_t*>(x.data) + at;
    if (x.aligned && valid >= Width) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      bits[0] = v.x;
      bits[1] = v.y;
      bits[2] = v.z;
      bits[3] = v.w;
      return;
    }
    UNROLL
    for (int i = 0; i < 4; ++i) bits[i] = i < valid ? from[i] : 0u;
    return;
  }
  const auto* from = static_cast<const uint16_t*>(x.data) + at;
  if (x.aligned && valid >= Width) {
    if constexpr (Width == 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      bits[0] = v.x;
      bits[1] = v.y;
      bits[2] = v.z;
      bits[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      bits[0] = v.x;
      bits[1] = v.y;
    }
    return;
  }
  UNROLL
  for (int i = 0; i < Width / 2; ++i) {
    const uint32_t low = 2 * i < valid ? from[2 * i] : 0u, high = 2 * i + 1 < valid ? from[2 * i + 1] : 0u;
    bits[i] = low | high << 16;
  }
}

template <int Width>
__device__ __forceinline__ void widen(float (&to)[Width], const uint32_t (&bits)[4], DType dtype) {
  UNROLL
  for (int i = 0; i < Width; ++i) {
    const auto half = static_cast<uint16_t>(bits[i / 2] >> (16 * (i % 2)));
    if (Width == 4 && dtype == DType::f32) to[i] = float_of(bits[i % 4]);
    else to[i] = dtype == DType::bf16 ? to_float(bf16{half}) : to_float(f16{half});
  }
}

template <int Width>
__device__ __forceinline__ void write(const DeviceRows& y, int64_t at, const float (&from)[Width], int valid) {
  const bool whole = y.aligned && valid >= Width;
  if (Width == 4 && y.dtype == DType::f32) {
    auto* to = static_cast<float*>(y.data) + at;
    if (whole) {  // by intrinsic: the compiler splits a plain vector store to share its parts with the scalar path
      __stwb(reinterpret_cast<uint4*>(to),
             make_uint4(bits_of(from[0]), bits_of(from[1]), bits_of(from[2]), bits_of(from[3])));
      return;
    }
    UNROLL
    for (int i = 0; i < Width; ++i) {
      if (i < valid) to[i] = from[i];
    }
    return;
  }
  uint16_t half[Width];
  UNROLL
  for (int i = 0; i < Width; ++i) {
    bf16 b;
    f16 h;
    store(&b, from[i]);
    store(&h, from[i]);
    half[i] = y.dtype == DType::bf16 ? b.bits : h.bits;
  }
  auto* to = static_cast<uint16_t*>(y.data) + at;
  if (whole) {
    uint32_t bits[4] = {};
    UNROLL
    for (int i = 0; i < Width / 2; ++i) {
      bits[i] = static_cast<uint32_t>(half[2 * i]) | static_cast<uint32_t>(half[2 * i + 1]) << 16;
    }
    if constexpr (Width == 8) __stwb(reinterpret_cast<uint4*>(to), make_uint4(bits[0], bits[1], bits[2], bits[3]));
    else __stwb(reinterpret_cast<uint2*>(to), make_uint2(bits[0], bits[1]));
    return;
  }
  UNROLL
  for (int i = 0; i < Width; ++i) {
    if (i < valid) to[i] = half[i];
  }
}

// ---- kernel -----------------------------------------------------------------------------------------------------------

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
    const int64_t pair = p.outer2 == 1 ? line : line / p.outer2, k = line - pair * p.outer2;
    const int64_t i = p.outer1 == 1 ? pair : pair / p.outer1, j = pair - i * p.outer1;
    const int64_t begin = part * kColumnsPerUnit, rest = p.columns - begin;
    const int count = rest < kColumnsPerUnit ? static_cast<int>(rest) : kColumnsPerUnit;
    for (int offset = lane * Width; offset < count; offset += 32 * Width) {
      const int left = count - offset;
      uint32_t bits[kInputs][4];
      float x[kInputs][Width];
      UNROLL
      for (int s = 0; s < kInputs; ++s) {
        if (!gated && s % 2 == 1 && s < 4) continue;
        if (!backward && s >= 4) continue;
        const DeviceRows& from = p.in[s];
        if (from.data)
          read<Width>(bits[s], from, i * from.stride[0] + j * from.stride[1] + k * from.stride[2] + begin + offset,
                      left);
      }
      UNROLL
      for (int s = 0; s < kInputs; ++s) {
        UNROLL
        for (int e = 0; e < Width; ++e) x[s][e] = 0.0f;
        if (!gated && s % 2 == 1 && s < 4) continue;
        if (!backward && s >= 4) continue;
        if (p.in[s].data) widen<Width>(x[s], bits[s], p.in[s].dtype);
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
        if (!backward && s >= 2) continue;
        if (backward && !gated && s % 2 == 1) continue;
        const DeviceRows& to = p.out[s];
        if (to.data)
          write<Width>(to, i * to.stride[0] + j * to.stride[1] + k * to.stride[2] + begin + offset, x[s], left);
      }
    }
  }
}

}  // namespace
}  // namespace activation_device
}  // namespace pyflowmap
