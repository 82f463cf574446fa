// attention_product.h - matrix products of tiles that lie in the cache, for the loops of attention on the CPU.
//
//   C[r, c] = start + sum over terms s, sum over k of  A_s(r, k) B_s[k, c]        A(r, k): rows, or columns, of a tile
//
// A micro-kernel keeps kRowTile x two vectors of C in registers over all terms, so that the two products of a tangent
// (dQ K' + Q dK', W V + P dV) cost one pass over C. A row of C takes the same additions in the same order however the
// rows are cut, which is what makes the result independent of blocks and threads.
//
// Included by *_isa.cpp only: PYFLOWMAP_ISA names the instruction set, and nothing here has external linkage.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#ifndef PYFLOWMAP_ISA
#define PYFLOWMAP_ISA base
#endif

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRowTile = 8;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRowTile = 6;  // 12 of 16 registers hold C, 3 more A and B
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRowTile = 8;
#else
constexpr int kVectorBytes = 16, kRowTile = 4;
#endif

template <class T> constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T> struct VectorOf { typedef T type __attribute__((vector_size(kVectorBytes))); };
template <class T> using Vector = typename VectorOf<T>::type;

template <class T> PFM_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class T> PFM_INLINE void put(T* to, const Vector<T>& v) { memcpy(to, &v, sizeof v); }

// The distance of rows in a tile of `columns` numbers: whole vectors, and an odd number of cache lines, so that a
// column of the tile does not fall into a few sets of the cache.
template <class T> PFM_INLINE int pitch_of(int columns) {
  const int line = 64 / static_cast<int>(sizeof(T));
  const int lines = (columns + line - 1) / line;
  return (lines | 1) * line;
}

PFM_INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

enum class Start { zero, add, scale };  // C = 0, C, or alpha[r] C

constexpr int kNoDiagonal = 1 << 28;

template <class T> struct Product {
  const T *a[2] = {}, *b[2] = {};
  int terms = 0;
  int pitch_a = 0, pitch_b = 0;
  bool across = false;  // A(r, k) = a[k * pitch_a + r], else a[r * pitch_a + k]
  T* c = nullptr;
  int pitch_c = 0;
  int rows = 0, columns = 0, k = 0;  // columns: of whole vectors
  Start start = Start::zero;
  const T* alpha = nullptr;
  // What causal attention need not form. Row r needs columns, or k, up to r + diagonal, or k from r - diagonal.
  int columns_to = kNoDiagonal, k_to = kNoDiagonal, k_from = kNoDiagonal;
  bool exact = false;  // not one product beyond the diagonal: hidden numbers that are not finite stay unseen

  Product& to(T* tile) {
    c = tile;
    terms = 0;
    return *this;
  }
  // One more term; nothing where a factor is null.
  Product& term(const T* x, const T* y) {
    if (x && y) {
      a[terms] = x;
      b[terms++] = y;
    }
    return *this;
  }
};

template <class T, int R, int N, bool Across>
PFM_INLINE void multiply_tile(const Product<T>& p, int row, int column, int first, int last) {
  constexpr int kL = kLanes<T>;
  Vector<T> c[R][N];
  T* to = p.c + static_cast<int64_t>(row) * p.pitch_c + column;
  const int64_t pitch_a = p.pitch_a, pitch_b = p.pitch_b, pitch_c = p.pitch_c;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      if (p.start == Start::zero) c[r][n] = Vector<T>{};
      else c[r][n] = load(to + r * pitch_c + n * kL);
      if (p.start == Start::scale) c[r][n] *= p.alpha[row + r];
    }
  }
  for (int s = 0; s < p.terms; ++s) {
    const T* a = p.a[s] + (Across ? first * pitch_a + row : row * pitch_a + first);
    const T* b = p.b[s] + first * pitch_b + column;
    for (int k = first; k < last; ++k) {
      Vector<T> y[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) y[n] = load(b + n * kL);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const T x = Across ? a[r] : a[r * pitch_a];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) c[r][n] += x * y[n];
      }
      a += Across ? pitch_a : 1;
      b += pitch_b;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) put(to + r * pitch_c + n * kL, c[r][n]);
  }
}

template <class T, int N, bool Across> void multiply_columns(const Product<T>& p, int column) {
  for (int row = 0; row < p.rows;) {
    const int left = p.exact ? 1 : p.rows - row;
    const int tile = left >= kRowTile ? kRowTile : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const int end = row + tile;
    const int first = row > p.k_from ? row - p.k_from : 0;
    const int last = p.k < end + p.k_to ? p.k : end + p.k_to;
    if (column < end + p.columns_to) {
      if (tile == kRowTile) multiply_tile<T, kRowTile, N, Across>(p, row, column, first, last);
      else if (tile == 4) multiply_tile<T, 4, N, Across>(p, row, column, first, last);
      else if (tile == 2) multiply_tile<T, 2, N, Across>(p, row, column, first, last);
      else multiply_tile<T, 1, N, Across>(p, row, column, first, last);
    }
    row = end;
  }
}

template <class T, bool Across> PFM_INLINE void multiply_all(const Product<T>& p) {
  int column = 0;
  for (; column + 2 * kLanes<T> <= p.columns; column += 2 * kLanes<T>) multiply_columns<T, 2, Across>(p, column);
  if (column < p.columns) multiply_columns<T, 1, Across>(p, column);
}

template <class T> PFM_INLINE void multiply(const Product<T>& p) {
  if (p.across) multiply_all<T, true>(p);
  else multiply_all<T, false>(p);
}

}  // namespace
}  // namespace pyflowmap::PYFLOWMAP_ISA
