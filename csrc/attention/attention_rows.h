// attention_rows.h - rows of a tensor to tiles of the arithmetic type and back, for attention on the CPU.
// A tile is rows of `pitch` numbers in the thread's scratch; what lies beyond the tensor's rows and columns is zero.
#pragma once
#include <cstdlib>

#include "attention/attention_product.h"
#include "common/rows.h"

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

PFM_INLINE void widen_row(float* __restrict to, const float* from, int n) {
  memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
}
PFM_INLINE void widen_row(double* __restrict to, const double* from, int n) {
  memcpy(to, from, static_cast<size_t>(n) * sizeof(double));
}
template <class T> PFM_INLINE void widen_row(float* __restrict to, const T* from, int n) {
  for (int i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

// Rows `first` ... of one head into a tile of `height` rows; `columns` numbers each.
template <class A, class T>
void pack_as(const Rows& x, int64_t sample, int64_t head, int64_t first, int rows, int height, int columns, A* tile,
             int pitch) {
  const int filled = round_up(columns, kLanes<A>);
  for (int r = 0; r < rows; ++r) {
    A* to = tile + static_cast<int64_t>(r) * pitch;
    widen_row(to, row<const T>(x, sample, head, first + r), columns);
    for (int c = columns; c < filled; ++c) to[c] = A(0);
  }
  for (int r = rows; r < height; ++r) {
    memset(tile + static_cast<int64_t>(r) * pitch, 0, static_cast<size_t>(filled) * sizeof(A));
  }
}

PFM_INLINE void pack(const Rows& x, int64_t sample, int64_t head, int64_t first, int rows, int height, int columns,
                     double* tile, int pitch) {
  pack_as<double, double>(x, sample, head, first, x ? rows : 0, height, columns, tile, pitch);
}
PFM_INLINE void pack(const Rows& x, int64_t sample, int64_t head, int64_t first, int rows, int height, int columns,
                     float* tile, int pitch) {
  if (!x) rows = 0;  // a tensor that is not given is zero
  if (x.dtype == DType::f32) pack_as<float, float>(x, sample, head, first, rows, height, columns, tile, pitch);
  else if (x.dtype == DType::bf16) pack_as<float, bf16>(x, sample, head, first, rows, height, columns, tile, pitch);
  else pack_as<float, f16>(x, sample, head, first, rows, height, columns, tile, pitch);
}

// to[c][r] = from[r][c], with zeros for the rows from `rows` to whole vectors. Eight rows at a time: one row after the
// other would touch a cache line per number.
template <class A> void transpose(const A* from, int pitch_from, int rows, int columns, A* to, int pitch_to) {
  constexpr int kBlock = 8;
  int r = 0;
  for (; r + kBlock <= rows; r += kBlock) {
    const A* x = from + static_cast<int64_t>(r) * pitch_from;
    for (int c = 0; c < columns; ++c) {
      A* y = to + static_cast<int64_t>(c) * pitch_to + r;
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) y[i] = x[static_cast<int64_t>(i) * pitch_from + c];
    }
  }
  const int filled = round_up(rows, kLanes<A>);
  if (r == filled) return;
  for (int c = 0; c < columns; ++c) {
    A* y = to + static_cast<int64_t>(c) * pitch_to;
    for (int i = r; i < rows; ++i) y[i] = from[static_cast<int64_t>(i) * pitch_from + c];
    for (int i = rows; i < filled; ++i) y[i] = A(0);
  }
}

template <class A> bool all_finite(const A* tile, int pitch, int rows, int columns) {
  A sum[kLanes<A>] = {};  // of x * 0: NaN where one x is not finite
  for (int r = 0; r < rows; ++r) {
    const A* x = tile + static_cast<int64_t>(r) * pitch;
    for (int c = 0; c < round_up(columns, kLanes<A>); c += kLanes<A>) {
      for (int i = 0; i < kLanes<A>; ++i) sum[i] += x[c + i] * A(0);
    }
  }
  A all = A(0);
  for (int i = 0; i < kLanes<A>; ++i) all += sum[i];
  return all == A(0);
}

PFM_INLINE void store_row(const Rows& y, int64_t sample, int64_t head, int64_t at, const double* from, int n) {
  memcpy(row<double>(y, sample, head, at), from, static_cast<size_t>(n) * sizeof(double));
}
PFM_INLINE void store_row(const Rows& y, int64_t sample, int64_t head, int64_t at, const float* from, int n) {
  if (y.dtype == DType::f32) {
    memcpy(row<float>(y, sample, head, at), from, static_cast<size_t>(n) * sizeof(float));
  } else if (y.dtype == DType::bf16) {
    bf16* to = row<bf16>(y, sample, head, at);
    for (int i = 0; i < n; ++i) store(to + i, from[i]);
  } else {
    f16* to = row<f16>(y, sample, head, at);
    for (int i = 0; i < n; ++i) store(to + i, from[i]);
  }
}

// Memory of a thread for one call, on 64 bytes; null where there is none.
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t bytes) : all_(std::malloc(static_cast<size_t>(bytes) + 64)) {}
  ~ScratchMemory() { std::free(all_); }
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;
  char* base() const {
    return all_ ? static_cast<char*>(all_) + (64 - reinterpret_cast<uintptr_t>(all_) % 64) % 64 : nullptr;
  }

 private:
  void* all_;
};

// Cuts one allocation into tiles on 64 bytes; without memory it only counts.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}
  template <class A> A* take(int64_t numbers) {
    A* at = base_ ? reinterpret_cast<A*>(base_ + used_) : nullptr;
    used_ += (numbers * static_cast<int64_t>(sizeof(A)) + 63) / 64 * 64;
    return at;
  }
  template <class A> A* tile(int64_t rows, int pitch, bool wanted = true) {
    return wanted ? take<A>(rows * pitch) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace pyflowmap::PYFLOWMAP_ISA
