// attention_tile.h - what the device kernels of `attention` share: tiles of rows in shared memory, the fragments that
// matrix products take from them, and which keys a query sees.
//
//   HeadRows<T>                 the tokens of one sample and head
//   load_tile, store_tile       between HeadRows and a tile; past the last token and column a tile holds zeros
//   Tile<T, D>                  rows of D elements whose 16-byte chunks are permuted, so that ldmatrix meets no conflict
//   Product<T>                  fragments of T and acc += a b: bf16 and f16 as they are, float as three bf16 each
//   hide_from, apply_mask       minus infinity for hidden keys, in the accumulators of S
//
// Of an accumulator (16 x 8) lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next: [0], [1] of the first
// row, [2], [3] of the second. Threads are one-dimensional blocks of whole warps.
#pragma once
#include <cmath>

#include "attention/attention.h"
#include "common/async_copy.h"
#include "common/launch.h"
#include "common/tensor_core.h"

#define PFM_DEVICE static __device__ __forceinline__

namespace pyflowmap {
namespace attention_device {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr unsigned kWarp = 0xffffffffu;

PFM_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }
PFM_DEVICE int warp_id() { return static_cast<int>(threadIdx.x / 32); }
PFM_DEVICE float minus_infinity() { return float_of(0xff800000u); }

// ---- numbers --------------------------------------------------------------------------------------------------------

#if defined(PYFLOWMAP_SIMT)
inline float exp2_approximate(float x) { return std::exp2(x); }
template <class T> inline uint32_t pack(float low, float high) {
  T pair[2];
  store(&pair[0], low);
  store(&pair[1], high);
  return static_cast<uint32_t>(pair[0].bits) | static_cast<uint32_t>(pair[1].bits) << 16;
}
template <class T> inline float low_of(uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair & 0xffffu)}); }
template <class T> inline float high_of(uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair >> 16)}); }
#elif defined(__CUDACC__)
// 2 ulp; what would be subnormal is 0, which a weight may be: the largest of its row is 1.
PFM_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two numbers rounded to nearest even, in one instruction.
template <class T> PFM_DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same<T, bf16>::value) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class T> PFM_DEVICE float low_of(uint32_t pair) {
  if constexpr (std::is_same<T, bf16>::value) return float_of(pair << 16);
  float x;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(pair));
  return x;
}
template <class T> PFM_DEVICE float high_of(uint32_t pair) {
  if constexpr (std::is_same<T, bf16>::value) return float_of(pair & 0xffff0000u);
  float x;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(pair));
  return x;
}
#endif

// Over the four lanes that hold a row of an accumulator.
PFM_DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
}
PFM_DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(kWarp, x, 1);
  return x + __shfl_xor_sync(kWarp, x, 2);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// Chunk c of row r lies where chunk c ^ phase(r) would. Eight consecutive rows then cover all banks once, for any number
// of chunks: those rows start in 8 / g different places, g the common divisor of chunks and 8; phase tells apart the g
// rows that start in the same one.
template <class T, int D> struct Tile {
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kChunks = D / kChunk;
  static constexpr int kShared = common_divisor(kChunks, 8);
  static_assert(D % 16 == 0, "a product takes 16 columns at a time");

  PFM_INLINE int phase(int row) { return row / (8 / kShared) & (kShared - 1); }
  // Where chunk `chunk` of row `row` begins, in elements.
  PFM_INLINE int chunk_at(int row, int chunk) { return row * D + (chunk ^ phase(row)) * kChunk; }
  // Element (row0 + row, column0 + column): row0 a multiple of 8, column0 of 16, row and column of this lane, < 16. Only
  // the constant part differs between fragments, which leaves one xor per 16 columns to compute.
  PFM_INLINE int at(int row0, int column0, int row, int column) {
    return (row0 + row) * D + (column0 / kChunk ^ (column / kChunk ^ phase(row))) * kChunk + column % kChunk;
  }
};

template <class T> struct HeadRows {
  T* data;  // null: not given, all zeros
  int64_t stride;
  bool aligned;  // all rows start on 16 bytes
};

template <class T> PFM_DEVICE HeadRows<T> head_rows(const Rows& x, int64_t sample, int64_t head) {
  T* const data = x.data ? row<T>(x, sample, head, 0) : nullptr;
  const auto misaligned = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(x.stride[2] * int64_t{sizeof(T)});
  return {data, x.stride[2], misaligned % 16 == 0};
}

PFM_DEVICE void clear_number(float* x) { *x = 0.0f; }
template <class T> PFM_DEVICE void clear_number(T* x) { x->bits = 0; }

// Tokens first .. first + kRows - 1 into a tile; zeros from token `end` and from column `columns` on. Asynchronous:
// commit, wait and a barrier are the caller's.
template <class T, int kRows, int D, int kThreads>
PFM_DEVICE void load_tile(T* tile, const HeadRows<T>& x, int first, int end, int columns) {
  using Layout = Tile<T, D>;
  constexpr int kWork = kRows * Layout::kChunks;
  const int thread = static_cast<int>(threadIdx.x);
  if (x.data && x.aligned) {
    UNROLL
    for (int i = 0; i < (kWork + kThreads - 1) / kThreads; ++i) {
      const int at = thread + i * kThreads, r = at / Layout::kChunks, c = at % Layout::kChunks;
      if (kWork % kThreads != 0 && at >= kWork) break;
      const int left = columns - c * Layout::kChunk;
      const bool inside = first + r < end && left > 0;
      const int bytes = inside ? (left < Layout::kChunk ? left : Layout::kChunk) * static_cast<int>(sizeof(T)) : 0;
      // What is not read needs a valid address all the same.
      const T* const from = inside ? x.data + (first + r) * x.stride + c * Layout::kChunk : x.data;
      async_copy<16>(tile + Layout::chunk_at(r, c), from, bytes);
    }
  } else {
    NO_UNROLL
    for (int at = thread; at < kRows * D; at += kThreads) {
      const int r = at / D, c = at % D;
      T* const to = tile + Layout::at(0, 0, r, c);
      if (x.data && first + r < end && c < columns) *to = x.data[(first + r) * x.stride + c];
      else clear_number(to);
    }
  }
}

// The other way, by threads 0 .. kThreads - 1 of the caller's counting; after a barrier.
template <class T, int kRows, int D, int kThreads>
PFM_DEVICE void store_tile(const HeadRows<T>& x, const T* tile, int first, int end, int columns, int thread) {
  using Layout = Tile<T, D>;
  if (x.aligned && columns % Layout::kChunk == 0) {
    NO_UNROLL
    for (int at = thread; at < kRows * Layout::kChunks; at += kThreads) {
      const int r = at / Layout::kChunks, c = at % Layout::kChunks;
      if (first + r >= end || c * Layout::kChunk >= columns) continue;
      const uint4 chunk = *reinterpret_cast<const uint4*>(tile + Layout::chunk_at(r, c));
      *reinterpret_cast<uint4*>(x.data + (first + r) * x.stride + c * Layout::kChunk) = chunk;
    }
  } else {
    NO_UNROLL
    for (int at = thread; at < kRows * D; at += kThreads) {
      const int r = at / D, c = at % D;
      if (first + r < end && c < columns) x.data[(first + r) * x.stride + c] = tile[Layout::at(0, 0, r, c)];
    }
  }
}

// The accumulators of 16 rows and 8 N columns into a tile, rounded.
template <class T, int D, int N>
PFM_DEVICE void place(T* tile, int row0, int column0, const float (&x)[N][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      T* const to = tile + Tile<T, D>::at(row0, column0 + n / 2 * 16, g + 8 * half, n % 2 * 8 + 2 * t);
      if constexpr (std::is_same<T, float>::value) {
        *reinterpret_cast<float2*>(to) = make_float2(x[n][2 * half], x[n][2 * half + 1]);
      } else {
        *reinterpret_cast<uint32_t*>(to) = pack<T>(x[n][2 * half], x[n][2 * half + 1]);
      }
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------
// load_a             A[m][k] = tile[row0 + m][column0 + k]         16 x 16
// load_a_transposed  A[m][k] = tile[row0 + k][column0 + m]
// load_b             B[k][n] = tile[row0 + n][column0 + k]         two fragments, columns 0..7 and 8..15
// load_b_transposed  B[k][n] = tile[row0 + k][column0 + n]
// keep, operand      two neighbouring accumulators as an A: kept in as few registers as hold them
// kept_pair          what was kept, two adjacent columns: [i][half] is accumulator i, its row `half`

// bf16, f16
template <class T> struct Product {
  struct A { uint32_t r[4]; };
  struct B { uint32_t r[2]; };
  using Kept = A;

  template <int D> PFM_DEVICE void load_a(A* a, const T* tile, int row0, int column0) {
    const int l = lane_id();
    load_matrix<4>(a->r, tile + Tile<T, D>::at(row0, column0, l % 16, l / 16 * 8));
  }
  template <int D> PFM_DEVICE void load_a_transposed(A* a, const T* tile, int row0, int column0) {
    const int l = lane_id();
    load_matrix_transposed<4>(a->r, tile + Tile<T, D>::at(row0, column0, l % 8 + l / 16 * 8, l / 8 % 2 * 8));
  }
  template <int D> PFM_DEVICE void load_b(B (&b)[2], const T* tile, int row0, int column0) {
    const int l = lane_id();
    uint32_t r[4];
    load_matrix<4>(r, tile + Tile<T, D>::at(row0, column0, l % 8 + l / 16 * 8, l / 8 % 2 * 8));
    b[0] = {{r[0], r[1]}};
    b[1] = {{r[2], r[3]}};
  }
  template <int D> PFM_DEVICE void load_b_transposed(B (&b)[2], const T* tile, int row0, int column0) {
    const int l = lane_id();
    uint32_t r[4];
    load_matrix_transposed<4>(r, tile + Tile<T, D>::at(row0, column0, l % 16, l / 16 * 8));
    b[0] = {{r[0], r[1]}};
    b[1] = {{r[2], r[3]}};
  }
  PFM_DEVICE void keep(Kept* a, const float (&left)[4], const float (&right)[4]) {
    a->r[0] = pack<T>(left[0], left[1]);
    a->r[1] = pack<T>(left[2], left[3]);
    a->r[2] = pack<T>(right[0], right[1]);
    a->r[3] = pack<T>(right[2], right[3]);
  }
  PFM_DEVICE void kept_pair(const Kept& a, int i, int half, float* first, float* second) {
    *first = low_of<T>(a.r[2 * i + half]);
    *second = high_of<T>(a.r[2 * i + half]);
  }
  PFM_DEVICE A operand(const Kept& a) { return a; }
  PFM_DEVICE void add(float (&acc)[4], const A& a, const B& b) { mma<T>(acc, a.r, b.r, acc); }
};

// float: x = x0 + x1 + x2, each a bf16 rounded to nearest, exactly. Of the nine partial products the three smallest,
// together below 2^-24 of the whole, are left out.
template <> struct Product<float> {
  struct A { uint32_t r[3][4]; };
  struct B { uint32_t r[3][2]; };
  struct Kept { float x[2][4]; };

  PFM_DEVICE void split(uint32_t* piece0, uint32_t* piece1, uint32_t* piece2, float low, float high) {
    *piece0 = pack<bf16>(low, high);
    low -= low_of<bf16>(*piece0);
    high -= high_of<bf16>(*piece0);
    *piece1 = pack<bf16>(low, high);
    *piece2 = pack<bf16>(low - low_of<bf16>(*piece1), high - high_of<bf16>(*piece1));
  }
  template <int D> PFM_DEVICE void load_a(A* a, const float* tile, int row0, int column0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 x =
          *reinterpret_cast<const float2*>(tile + Tile<float, D>::at(row0, column0, g + i % 2 * 8, 2 * t + i / 2 * 8));
      split(&a->r[0][i], &a->r[1][i], &a->r[2][i], x.x, x.y);
    }
  }
  template <int D> PFM_DEVICE void load_a_transposed(A* a, const float* tile, int row0, int column0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const int k = 2 * t + i / 2 * 8, m = g + i % 2 * 8;
      split(&a->r[0][i], &a->r[1][i], &a->r[2][i], tile[Tile<float, D>::at(row0, column0, k, m)],
            tile[Tile<float, D>::at(row0, column0, k + 1, m)]);
    }
  }
  template <int D> PFM_DEVICE void load_b(B (&b)[2], const float* tile, int row0, int column0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 x =
          *reinterpret_cast<const float2*>(tile + Tile<float, D>::at(row0, column0, g + i / 2 * 8, 2 * t + i % 2 * 8));
      B& to = b[i / 2];
      split(&to.r[0][i % 2], &to.r[1][i % 2], &to.r[2][i % 2], x.x, x.y);
    }
  }
  template <int D> PFM_DEVICE void load_b_transposed(B (&b)[2], const float* tile, int row0, int column0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const int k = 2 * t + i % 2 * 8, n = g + i / 2 * 8;
      B& to = b[i / 2];
      split(&to.r[0][i % 2], &to.r[1][i % 2], &to.r[2][i % 2], tile[Tile<float, D>::at(row0, column0, k, n)],
            tile[Tile<float, D>::at(row0, column0, k + 1, n)]);
    }
  }
  PFM_DEVICE void keep(Kept* a, const float (&left)[4], const float (&right)[4]) {
    UNROLL
    for (int e = 0; e < 4; ++e) {
      a->x[0][e] = left[e];
      a->x[1][e] = right[e];
    }
  }
  PFM_DEVICE void kept_pair(const Kept& a, int i, int half, float* first, float* second) {
    *first = a.x[i][2 * half];
    *second = a.x[i][2 * half + 1];
  }
  PFM_DEVICE A operand(const Kept& kept) {
    A a;
    UNROLL
    for (int i = 0; i < 4; ++i) {
      split(&a.r[0][i], &a.r[1][i], &a.r[2][i], kept.x[i / 2][i % 2 * 2], kept.x[i / 2][i % 2 * 2 + 1]);
    }
    return a;
  }
  // The small ones first.
  PFM_DEVICE void add(float (&acc)[4], const A& a, const B& b) {
    mma<bf16>(acc, a.r[2], b.r[0], acc);
    mma<bf16>(acc, a.r[0], b.r[2], acc);
    mma<bf16>(acc, a.r[1], b.r[1], acc);
    mma<bf16>(acc, a.r[1], b.r[0], acc);
    mma<bf16>(acc, a.r[0], b.r[1], acc);
    mma<bf16>(acc, a.r[0], b.r[0], acc);
  }
};

// ---- which keys a query sees ----------------------------------------------------------------------------------------

PFM_DEVICE int keys_of_sample(const AttentionProblem& p, int64_t sample) {
  if (!p.lengths) return static_cast<int>(p.keys);
  const int64_t n = p.lengths[sample];
  return static_cast<int>(n < 0 ? 0 : n < p.keys ? n : p.keys);
}

// Minus infinity from key end[half] on, for the rows of each half; `key` is the key of this lane's first column.
template <int N> PFM_DEVICE void hide_from(float (&s)[N][4], int key, const int (&end)[2]) {
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int e = 0; e < 4; ++e) {
      if (key + 8 * n + e % 2 >= end[e / 2]) s[n][e] = minus_infinity();
    }
  }
}

struct MaskBool { uint8_t byte; };
PFM_DEVICE float mask_value(MaskBool x) { return x.byte ? 0.0f : minus_infinity(); }
template <class M> PFM_DEVICE float mask_value(M x) { return to_float(x) * kLog2E; }

template <class M, int N>
PFM_DEVICE void add_mask(float (&s)[N][4], const AttentionMask& mask, int64_t start, int query, int key, int queries,
                         int keys) {
  const auto* const data = static_cast<const M*>(mask.data) + start;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int i = query + 8 * half;
    if (i >= queries) continue;
    UNROLL
    for (int n = 0; n < N; ++n) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int j = key + 8 * n + e;
        if (j < keys) s[n][2 * half + e] += mask_value(data[i * mask.stride[2] + j * mask.stride[3]]);
      }
    }
  }
}

// Adds log2(e) mask[sample, head, i, j] to S (in units of log 2); minus infinity where a boolean mask hides. `query` and
// `key` are those of this lane's first element.
template <int N>
PFM_DEVICE void apply_mask(float (&s)[N][4], const AttentionMask& mask, int64_t sample, int64_t head, int query,
                           int key, int queries, int keys) {
  const int64_t start = sample * mask.stride[0] + head * mask.stride[1];
  if (mask.boolean) add_mask<MaskBool>(s, mask, start, query, key, queries, keys);
  else if (mask.dtype == DType::f32) add_mask<float>(s, mask, start, query, key, queries, keys);
  else if (mask.dtype == DType::bf16) add_mask<bf16>(s, mask, start, query, key, queries, keys);
  else if (mask.dtype == DType::f16) add_mask<f16>(s, mask, start, query, key, queries, keys);
  else add_mask<double>(s, mask, start, query, key, queries, keys);
}

}  // namespace attention_device
}  // namespace pyflowmap
