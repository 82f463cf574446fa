// combine_terms.h - the inner loops of `combine` on the CPU: one output, or two at once, from terms that are not zero.
#pragma once
#include <cstring>

#include "common/dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyflowmap {
namespace {  // compiled once per instruction set: internal linkage, like the functions of common/dtype.h

constexpr int kAhead = 128;  // elements: with six streams at once the hardware prefetcher comes a tenth too late

template <class A> struct Wide;
template <> struct Wide<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct Wide<double> { typedef double type __attribute__((vector_size(64))); };

// The destination is aligned to 64 bytes (combine.cpp asks for streaming only then).
PFM_INLINE void store_past_cache(float* to, const Wide<float>::type& v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX__)
  __m256 half[2];
  memcpy(half, &v, 64);
  _mm256_stream_ps(to, half[0]);
  _mm256_stream_ps(to + 8, half[1]);
#elif defined(__SSE2__)
  __m128 quarter[4];
  memcpy(quarter, &v, 64);
  for (int i = 0; i < 4; ++i) _mm_stream_ps(to + 4 * i, quarter[i]);
#else
  memcpy(to, &v, 64);
#endif
}
PFM_INLINE void store_past_cache(double* to, const Wide<double>::type& v) { memcpy(to, &v, 64); }

template <class A, int T, bool Stream>
PFM_INLINE void combine_terms(A* to, const A* const* terms, const A* coefficients, int n) {
  using V = typename Wide<A>::type;
  constexpr int kWidth = 64 / static_cast<int>(sizeof(A));
  const A* x[T];
  A c[T];
  for (int t = 0; t < T; ++t) {
    x[t] = terms[t];
    c[t] = coefficients[t];
  }
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    V v, sum;
    memcpy(&v, x[0] + i, 64);
    sum = c[0] * v;
    for (int t = 1; t < T; ++t) {
      memcpy(&v, x[t] + i, 64);
      sum += c[t] * v;
    }
    if (Stream) store_past_cache(to + i, sum);
    else memcpy(to + i, &sum, 64);
  }
  for (; i < n; ++i) {
    A sum = c[0] * x[0][i];
    for (int t = 1; t < T; ++t) sum += c[t] * x[t][i];
    to[i] = sum;
  }
}

template <class A, bool Stream>
PFM_INLINE void combine_chunk(A* to, const A* const* terms, const A* coefficients, int count, int n) {
  switch (count) {
    case 0:
      for (int i = 0; i < n; ++i) to[i] = A(0);
      break;
    case 1: combine_terms<A, 1, Stream>(to, terms, coefficients, n); break;
    case 2: combine_terms<A, 2, Stream>(to, terms, coefficients, n); break;
    case 3: combine_terms<A, 3, Stream>(to, terms, coefficients, n); break;
    case 4: combine_terms<A, 4, Stream>(to, terms, coefficients, n); break;
    case 5: combine_terms<A, 5, Stream>(to, terms, coefficients, n); break;
    case 6: combine_terms<A, 6, Stream>(to, terms, coefficients, n); break;
    case 7: combine_terms<A, 7, Stream>(to, terms, coefficients, n); break;
    case 8: combine_terms<A, 8, Stream>(to, terms, coefficients, n); break;
    default: combine_terms<A, 9, Stream>(to, terms, coefficients, n); break;
  }
}

// Two outputs from one reading of the operands. Storing the first output of a chunk before the operands are read for the
// second costs a third: large tensors lie at the same offset of their pages, and a load waits for an older store to the
// same offset of another page.
template <class A, int T, bool Stream>
PFM_INLINE void combine_pair_terms(A* to0, A* to1, const A* const* terms, const A* a0, const A* a1, int n) {
  using V = typename Wide<A>::type;
  constexpr int kWidth = 64 / static_cast<int>(sizeof(A));
  const A* x[T];
  A c0[T], c1[T];
  bool in0[T], in1[T];
  for (int t = 0; t < T; ++t) {
    x[t] = terms[t];
    c0[t] = a0[t];
    c1[t] = a1[t];
    in0[t] = a0[t] != A(0);
    in1[t] = a1[t] != A(0);
  }
  int i = 0;
  const V nothing = -V{};  // -0: adding it changes no number, as if the sum began with its first term
  for (; i + kWidth <= n; i += kWidth) {
    V v, sum0 = nothing, sum1 = nothing;
    for (int t = 0; t < T; ++t) {
      __builtin_prefetch(x[t] + i + kAhead);
      memcpy(&v, x[t] + i, 64);
      if (in0[t]) sum0 += c0[t] * v;
      if (in1[t]) sum1 += c1[t] * v;
    }
    if (Stream) {
      store_past_cache(to0 + i, sum0);
      store_past_cache(to1 + i, sum1);
    } else {
      memcpy(to0 + i, &sum0, 64);
      memcpy(to1 + i, &sum1, 64);
    }
  }
  for (; i < n; ++i) {
    A sum0 = -A(0), sum1 = -A(0);
    for (int t = 0; t < T; ++t) {
      if (in0[t]) sum0 += c0[t] * x[t][i];
      if (in1[t]) sum1 += c1[t] * x[t][i];
    }
    to0[i] = sum0;
    to1[i] = sum1;
  }
}

template <class A, bool Stream>
PFM_INLINE void combine_pair(A* to0, A* to1, const A* const* terms, const A* a0, const A* a1, int count, int n) {
  switch (count) {
    case 2: combine_pair_terms<A, 2, Stream>(to0, to1, terms, a0, a1, n); break;
    case 3: combine_pair_terms<A, 3, Stream>(to0, to1, terms, a0, a1, n); break;
    case 4: combine_pair_terms<A, 4, Stream>(to0, to1, terms, a0, a1, n); break;
    case 5: combine_pair_terms<A, 5, Stream>(to0, to1, terms, a0, a1, n); break;
    default: combine_pair_terms<A, 6, Stream>(to0, to1, terms, a0, a1, n); break;
  }
}

template <class A>
PFM_INLINE void combine_masked(A* to, const A* const* terms, const A* a, const A* b, const A* mask, int count, int n) {
  for (int i = 0; i < n; ++i) to[i] = A(0);
  for (int t = 0; t < count; ++t) {
    const A* x = terms[t];
    const A at = a[t], bt = b[t];
    for (int i = 0; i < n; ++i) {
      const A c = at + mask[i] * bt;
      const A term = c * x[i];
      to[i] += c == A(0) ? A(0) : term;
    }
  }
}

}  // namespace
}  // namespace pyflowmap
