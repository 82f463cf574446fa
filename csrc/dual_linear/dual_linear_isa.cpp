// dual_linear_isa.cpp - the loops of `dual_linear` on the CPU. Compiled once per instruction set into a namespace of
// its own (PYFLOWMAP_ISA = base, v3, v4); dual_linear.cpp chooses one at run time. Contract: dual_linear.h.
//
// Four rows of W at a time meet the vectors (rows of x and dx) one or two by two: a row of W leaves memory once, and is
// found in the first cache by the vectors after the first. Each sum has 16 lanes, whatever a register holds.
#include "dual_linear/dual_linear_isa.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

#ifndef PYFLOWMAP_ISA
#define PYFLOWMAP_ISA base
#endif

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 4;  // of W, whose sums are folded together
#if defined(__AVX512F__)
constexpr int kWidth = 16, kAtOnce = 4;
#elif defined(__AVX__)
constexpr int kWidth = 8, kAtOnce = 2;
#else
constexpr int kWidth = 4, kAtOnce = 1;
#endif
// kAtOnce rows of W are walked together: as many sums of two vectors as fit into the registers. Vectors of another
// width than a register's are kept in memory by the compiler, hence parts.
constexpr int kParts = kLanes / kWidth;
typedef float Register __attribute__((vector_size(kWidth * 4)));
typedef float Four __attribute__((vector_size(16)));

// a * b + c. Named, because the compiler undoes fused ones in a short loop, and then v3 and v4 would differ.
PFM_INLINE Register multiply_add(Register a, Register b, Register c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

struct Lanes { Register part[kParts]; };

PFM_INLINE Lanes load(const float* from) {
  Lanes lanes;
  for (int j = 0; j < kParts; ++j) memcpy(&lanes.part[j], from + j * kWidth, sizeof(Register));
  return lanes;
}

template <class T> PFM_INLINE Lanes load(const T* from) {
  alignas(64) float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = to_float(from[i]);
  return load(wide);
}

// The last n < 16 numbers, then zeros.
template <class T> PFM_INLINE Lanes load_some(const T* from, int64_t n) {
  alignas(64) T some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = from[i];
  return load(some);
}

// sums[b * kVectors + v]: the lanes of row b of W times vector v.
template <int kCount, int kVectors, class T>
PFM_INLINE void products(const T* w, int64_t w_stride, const T* const* x, int64_t n, float (*sums)[kLanes]) {
  Lanes sum[kCount][kVectors] = {};
  const auto step = [&](const auto& loaded, int64_t i) __attribute__((always_inline)) {
    Lanes a[kVectors];
    for (int v = 0; v < kVectors; ++v) a[v] = loaded(x[v] + i);
    for (int b = 0; b < kCount; ++b) {
      const Lanes row = loaded(w + b * w_stride + i);
      for (int v = 0; v < kVectors; ++v) {
        for (int j = 0; j < kParts; ++j) sum[b][v].part[j] = multiply_add(row.part[j], a[v].part[j], sum[b][v].part[j]);
      }
    }
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    step([](const T* p) __attribute__((always_inline)) { return load(p); }, i);
  if (whole < n) {
    step([&](const T* p) __attribute__((always_inline)) { return load_some(p, n - whole); }, whole);
  }
  for (int b = 0; b < kCount; ++b) {
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums[b * kVectors + v];
      for (int j = 0; j < kParts; ++j) memcpy(to + j * kWidth, &sum[b][v].part[j], sizeof(Register));
    }
  }
}

// The sum of 16 lanes: halves are added until one is left.
PFM_INLINE float fold(const float* lanes) {
  Four part[4];
  memcpy(part, lanes, sizeof part);
  const Four four = (part[0] + part[2]) + (part[1] + part[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <class T> struct Vectors {
  int count = 0;
  const T* from[2 * kMostLinearRows];
  T* to[2 * kMostLinearRows];
  bool biased[2 * kMostLinearRows];
};

// Outputs o to o + count, count <= kRows, of vectors v to v + kVectors.
template <int kVectors, class T>
PFM_INLINE void outputs_of(const DualLinearParams& p, const Vectors<T>& vectors, int v, int64_t o, int count) {
  alignas(64) float sums[kRows * kVectors][kLanes];
  const T* w = static_cast<const T*>(p.weight.data) + o * p.weight.stride;
  const T* const* x = vectors.from + v;
  int b = 0;
  for (; b + kAtOnce <= count; b += kAtOnce)
    products<kAtOnce, kVectors>(w + b * p.weight.stride, p.weight.stride, x, p.inputs, sums + b * kVectors);
  for (; b < count; ++b)
    products<1, kVectors>(w + b * p.weight.stride, p.weight.stride, x, p.inputs, sums + b * kVectors);
  const T* bias = static_cast<const T*>(p.bias);
  for (int k = 0; k < kVectors; ++k) {
    for (b = 0; b < count; ++b) {
      float sum = fold(sums[b * kVectors + k]);
      if (bias && vectors.biased[v + k]) sum += to_float(bias[o + b]);
      store(vectors.to[v + k] + o + b, sum);
    }
  }
}

template <class T> PFM_INLINE void all_outputs(const DualLinearParams& p, int64_t first, int64_t last) {
  Vectors<T> vectors;
  const auto add = [&](const LinearRows& from, const LinearRows& to, int64_t r, bool biased) {
    vectors.from[vectors.count] = static_cast<const T*>(from.data) + r * from.stride;
    vectors.to[vectors.count] = static_cast<T*>(to.data) + r * to.stride;
    vectors.biased[vectors.count++] = biased;
  };
  for (int64_t r = 0; r < p.rows; ++r) {
    add(p.x, p.y, r, true);
    if (p.dx.data) add(p.dx, p.dy, r, false);
  }
  for (int64_t o = first; o < last; o += kRows) {
    const int count = static_cast<int>(last - o < kRows ? last - o : kRows);
    int v = 0;
    for (; v + 2 <= vectors.count; v += 2) outputs_of<2>(p, vectors, v, o, count);
    if (v < vectors.count) outputs_of<1>(p, vectors, v, o, count);
  }
}

}  // namespace

void dual_linear_outputs(const DualLinearParams& p, int64_t first, int64_t last) {
  if (p.dtype == DType::f32) all_outputs<float>(p, first, last);
  else if (p.dtype == DType::bf16) all_outputs<bf16>(p, first, last);
  else all_outputs<f16>(p, first, last);
}

}  // namespace pyflowmap::PYFLOWMAP_ISA
