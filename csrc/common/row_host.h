// row_host.h - steps that the CPU loops of row-wise kernels share (*_isa.cpp; arithmetic in A, float or double): a piece
// of a row as A, in place or widened; sums over it in lanes, whose order does not depend on the instruction set.
#pragma once
#include "common/column_sums.h"
#include "common/rows.h"

// Of a lambda in a loop: outlined, it would pass its vectors through memory.
#define PFM_INLINED __attribute__((always_inline))

namespace pyflowmap {

// ---- rows -----------------------------------------------------------------------------------------------------------

struct RowPlace { int64_t i, j, k; };

PFM_INLINE RowPlace place_of(const RowShape& shape, int64_t row) {
  const int64_t outer = row / shape.outer[2];
  return {outer / shape.outer[1], outer % shape.outer[1], row % shape.outer[2]};
}

PFM_INLINE void next_row(const RowShape& shape, RowPlace* at) {
  if (++at->k < shape.outer[2]) return;
  at->k = 0;
  if (++at->j < shape.outer[1]) return;
  at->j = 0;
  ++at->i;
}

PFM_INLINE int64_t start_of(const Rows& x, const RowPlace& at) {
  return at.i * x.stride[0] + at.j * x.stride[1] + at.k * x.stride[2];
}

template <class A, class T> PFM_INLINE void widen_row(A* __restrict to, const Rows& x, int64_t at, int64_t n) {
  const T* from = static_cast<const T*>(x.data) + at;
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

template <class A, class T> PFM_INLINE void narrow_row(const Rows& y, int64_t at, const A* __restrict from, int64_t n) {
  T* to = static_cast<T*>(y.data) + at;
  for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
}

PFM_INLINE bool is_stored_as(const Rows& x, float) { return x.dtype == DType::f32; }
PFM_INLINE bool is_stored_as(const Rows& x, double) { return x.dtype == DType::f64; }

// n numbers from element `at`: where they lie, or in `space` after widening.
PFM_INLINE const float* read_row(const Rows& x, int64_t at, int64_t n, float* space) {
  if (x.dtype == DType::f32) return static_cast<const float*>(x.data) + at;
  if (x.dtype == DType::bf16) widen_row<float, bf16>(space, x, at, n);
  else widen_row<float, f16>(space, x, at, n);
  return space;
}
PFM_INLINE const double* read_row(const Rows& x, int64_t at, int64_t, double*) {
  return static_cast<const double*>(x.data) + at;
}

// Where to write n numbers: into the result itself, or into `space`, from where `write_row` stores them.
template <class A> PFM_INLINE A* target_row(const Rows& y, int64_t at, A* space) {
  return y && is_stored_as(y, A(0)) ? static_cast<A*>(y.data) + at : space;
}
PFM_INLINE void write_row(const Rows& y, int64_t at, int64_t n, const float* from) {
  if (!y || y.dtype == DType::f32) return;
  if (y.dtype == DType::bf16) narrow_row<float, bf16>(y, at, from, n);
  else narrow_row<float, f16>(y, at, from, n);
}
PFM_INLINE void write_row(const Rows&, int64_t, int64_t, const double*) {}

// ---- sums -----------------------------------------------------------------------------------------------------------

constexpr int kLanes = 16;
template <class A> struct LanesOf;
template <> struct LanesOf<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct LanesOf<double> { typedef double type __attribute__((vector_size(128))); };
template <class A> using Lanes = typename LanesOf<A>::type;

// Reads kLanes numbers, or the last ones of a row and `fill`.
template <class A> struct LoadAll {
  int64_t at;
  __attribute__((always_inline)) void operator()(Lanes<A>& to, const A* from, A) const { memcpy(&to, from + at, sizeof to); }
};
template <class A> struct LoadSome {
  int64_t at;
  int count;
  __attribute__((always_inline)) void operator()(Lanes<A>& to, const A* from, A fill) const {
    for (int i = 0; i < kLanes; ++i) to[i] = fill;
    memcpy(&to, from + at, static_cast<size_t>(count) * sizeof(A));
  }
};

template <class A> PFM_INLINE A fold_lanes(const Lanes<A>& lanes) {
  A lane[kLanes];
  memcpy(lane, &lanes, sizeof lane);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// N sums over n columns at once: term(sums, load) adds kLanes columns of each, which it reads by
// load(lanes, row, fill); past the end of the row a column is `fill`, which should make the term 0.
template <class A, int N, class Term> PFM_INLINE void row_sums(int64_t n, A (&to)[N], const Term& term) {
  Lanes<A> even[N] = {}, odd[N] = {};  // two chains: an addition takes four cycles
  int64_t at = 0;
  for (; at + 2 * kLanes <= n; at += 2 * kLanes) {
    term(even, LoadAll<A>{at});
    term(odd, LoadAll<A>{at + kLanes});
  }
  if (at + kLanes <= n) {
    term(even, LoadAll<A>{at});
    at += kLanes;
  }
  if (at < n) term(odd, LoadSome<A>{at, static_cast<int>(n - at)});
  for (int i = 0; i < N; ++i) {
    even[i] += odd[i];
    to[i] = fold_lanes<A>(even[i]);
  }
}

// ---- sums over rows -------------------------------------------------------------------------------------------------

// term(c) for n columns from `column` on into result `which`: into the sums of its chunk, or straight where no other row
// shares it; `space`: n numbers.
template <class A, class Term>
PFM_INLINE void put_or_add(const ColumnSums& sums, int which, const Rows& to, A* partial, bool first_of_chunk,
                           const RowPlace& at, int64_t column, int64_t n, int64_t columns, A* space, const Term& term) {
  if (!to) return;
  if (sums.slot[which] >= 0) {
    A* __restrict sum = partial + sums.slot[which] * columns + column;
    if (first_of_chunk) {
      for (int64_t c = 0; c < n; ++c) sum[c] = term(c);
    } else {
      for (int64_t c = 0; c < n; ++c) sum[c] += term(c);
    }
    return;
  }
  const int64_t start = start_of(to, at) + column;
  A* __restrict target = target_row(to, start, space);
  for (int64_t c = 0; c < n; ++c) target[c] = term(c);
  write_row(to, start, n, target);
}

// Adds up the partials of a row of result `which`, one per segment of rows that share it.
template <class A>
PFM_INLINE void finish_sums(const ColumnSums& sums, const Rows& to, int which, const RowShape& shape, const A* partials,
                            int64_t segment, double* total, A* row) {
  const int64_t n = shape.columns, chunks = sums.shares[which] / sums.period * sums.per_period;
  const A* from = partials + (segment * chunks * sums.slots + sums.slot[which]) * n;
  for (int64_t c = 0; c < n; ++c) total[c] = from[c];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const A* next = from + chunk * sums.slots * n;
    for (int64_t c = 0; c < n; ++c) total[c] += next[c];
  }
  const int64_t at = start_of(to, place_of(shape, segment * sums.shares[which]));
  A* target = target_row(to, at, row);
  for (int64_t c = 0; c < n; ++c) target[c] = static_cast<A>(total[c]);
  write_row(to, at, n, target);
}

}  // namespace pyflowmap
