// attention_forward_kernel.h - O, and dO beside it, of a block of queries: one pass over the keys, as in FlashAttention-2.
//
//   per tile of keys:   S = c Q K'   dS = c (dQ K' + Q dK')   P = exp(S - m)   W = P * dS
//                       O += P V     T += W V + P dV          l += rowsum(P)   mu += rowsum(W)
//   at the end:         O / l        (T - (mu / l) O) / l     m + log l        mu / l
//
// all of them rescaled where the running maximum m grows. P and W leave S and dS in the layout in which a product takes
// its left operand, so that nothing but rows of the inputs passes through shared memory.
#pragma once
#include "attention/attention_tile.h"

namespace pyflowmap {
namespace attention_device {

// One instantiation: a block is kRowWarps x kColumnWarps warps. A warp has 16 M queries; where an accumulator as wide as
// the head would not fit its registers, warps of the same queries form the same S and own a part of the columns of O.
template <class T_, int D_, bool kTangent_, int M_, int kRowWarps_, int kColumnWarps_, int kKeys_>
struct ForwardConfig {
  using T = T_;
  static constexpr int D = D_, M = M_, kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_, kKeys = kKeys_;
  static constexpr bool kTangent = kTangent_;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kQueries = 16 * M * kRowWarps;
  static constexpr int kColumns = D / kColumnWarps;  // of O, per warp
  // Of the loop over columns of Q. Unrolled further, its addresses are kept through the loop over keys, in registers that
  // a wide head has not.
  static constexpr int kUnroll = sizeof(T) == 4 ? 1 : D < 128 ? D / 16 : kTangent ? 4 : 2;
  // Per multiprocessor. A narrow head leaves registers for more, so that one forms weights while others multiply.
  static constexpr int kBlocks = kTangent && D <= 32 ? 4 : 2;
  static_assert(kKeys % 16 == 0 && kColumns % 16 == 0, "a product takes 16 at a time");

  // Q and dQ stay; one tile each of K and V, and of their tangents where they are given.
  static constexpr size_t shared_bytes(bool dk, bool dv) {
    const int queries = (kTangent ? 2 : 1) * kQueries, keys = (2 + (dk ? 1 : 0) + (dv ? 1 : 0)) * kKeys;
    return static_cast<size_t>(queries + keys) * D * sizeof(T);
  }
};

// What the accumulators of a warp are at, per row that a lane holds: [tile of 16][half].
template <int M> struct RowState { float maximum[M][2], total[M][2], weighted[M][2]; };

// s += A B' and, where there is one, ds += dA B', over all columns.
template <class C, bool kBoth>
PFM_DEVICE void multiply_keys(float (&s)[C::M][C::kKeys / 8][4], float (&ds)[C::M][C::kKeys / 8][4],
                              const typename C::T* a_tile, const typename C::T* da_tile, const typename C::T* b_tile,
                              int row0) {
  using Product = attention_device::Product<typename C::T>;
#pragma unroll(C::kUnroll)
  for (int k = 0; k < C::D; k += 16) {
    typename Product::A a[C::M], da[C::M];
    UNROLL
    for (int m = 0; m < C::M; ++m) {
      Product::template load_a<C::D>(&a[m], a_tile, row0 + 16 * m, k);
      if constexpr (kBoth) Product::template load_a<C::D>(&da[m], da_tile, row0 + 16 * m, k);
    }
    UNROLL
    for (int n = 0; n < C::kKeys / 8; n += 2) {
      typename Product::B b[2];
      Product::template load_b<C::D>(b, b_tile, 8 * n, k);
      UNROLL
      for (int m = 0; m < C::M; ++m) {
        UNROLL
        for (int i = 0; i < 2; ++i) {
          Product::add(s[m][n + i], a[m], b[i]);
          if constexpr (kBoth) Product::add(ds[m][n + i], da[m], b[i]);
        }
      }
    }
  }
}

// x += A B and, where kBoth, y += dA B, over the keys of a tile and this warp's columns.
template <class C, bool kBoth>
PFM_DEVICE void multiply_values(float (&x)[C::M][C::kColumns / 8][4], float (&y)[C::M][C::kColumns / 8][4],
                                const typename Product<typename C::T>::Kept (&a)[C::M][C::kKeys / 16],
                                const typename Product<typename C::T>::Kept (&da)[C::M][C::kKeys / 16],
                                const typename C::T* b_tile, int column0) {
  using Product = attention_device::Product<typename C::T>;
  UNROLL
  for (int k = 0; k < C::kKeys / 16; ++k) {
    typename Product::A left[C::M], d_left[C::M];
    UNROLL
    for (int m = 0; m < C::M; ++m) {
      left[m] = Product::operand(a[m][k]);
      if constexpr (kBoth) d_left[m] = Product::operand(da[m][k]);
    }
    UNROLL
    for (int n = 0; n < C::kColumns / 8; n += 2) {
      typename Product::B b[2];
      Product::template load_b_transposed<C::D>(b, b_tile, 16 * k, column0 + 8 * n);
      UNROLL
      for (int m = 0; m < C::M; ++m) {
        UNROLL
        for (int i = 0; i < 2; ++i) {
          Product::add(x[m][n + i], left[m], b[i]);
          if constexpr (kBoth) Product::add(y[m][n + i], d_left[m], b[i]);
        }
      }
    }
  }
}

// S becomes P and dS becomes W, unrounded; `shrink` is what sums so far are to be multiplied by.
template <class C>
PFM_DEVICE void soften(float (&s)[C::M][C::kKeys / 8][4], float (&ds)[C::M][C::kKeys / 8][4], RowState<C::M>* state,
                       float (&shrink)[C::M][2]) {
  UNROLL
  for (int m = 0; m < C::M; ++m) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      float top = minus_infinity();
      UNROLL
      for (int n = 0; n < C::kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      const float before = state->maximum[m][half], now = fmaxf(before, row_max(top));
      const float base = now == minus_infinity() ? 0.0f : now;  // nothing seen yet: no infinity minus infinity
      shrink[m][half] = exp2_approximate(before - base);
      state->maximum[m][half] = now;
      float sum = 0.0f;
      UNROLL
      for (int n = 0; n < C::kKeys / 8; ++n) {
        UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const bool hidden = s[m][n][e] == minus_infinity();
          const float weight = exp2_approximate(s[m][n][e] - base);
          s[m][n][e] = weight;
          sum += weight;
          // The tangent of a hidden key may be anything.
          if constexpr (C::kTangent) ds[m][n][e] = hidden ? 0.0f : weight * ds[m][n][e];
        }
      }
      state->total[m][half] = state->total[m][half] * shrink[m][half] + sum;
    }
  }
}

template <int N> PFM_DEVICE void clear(float (&x)[N][4]) {
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int e = 0; e < 4; ++e) x[n][e] = 0.0f;
  }
}
template <int N> PFM_DEVICE void multiply(float (&x)[N][4], float first, float second) {
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int e = 0; e < 4; ++e) x[n][e] *= e < 2 ? first : second;
  }
}

// ---- values that are not finite -------------------------------------------------------------------------------------
// Under a causal mask some queries of a tile do not see some of its keys. Their weight is 0, and 0 * NaN would be NaN.

template <class C> PFM_DEVICE bool all_finite(const typename C::T* tile) {
  using T = typename C::T;
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  union {
    uint4 words;
    T numbers[kChunk];
  } chunk;
  bool fine = true;
  NO_UNROLL
  for (int at = static_cast<int>(threadIdx.x); at < C::kKeys * C::D / kChunk; at += C::kThreads) {
    chunk.words = reinterpret_cast<const uint4*>(tile)[at];
    UNROLL
    for (int i = 0; i < kChunk; ++i) fine = fine && finite(chunk.numbers[i]);
  }
  return fine;
}

// Zeros in their place; first[c] becomes the first key that had one in column c, or one past all keys.
template <class C> PFM_DEVICE void take_out(int* first, typename C::T* tile, int key) {
  NO_UNROLL
  for (int c = static_cast<int>(threadIdx.x); c < C::D; c += C::kThreads) {
    int found = 0x7fffffff;
    NO_UNROLL
    for (int j = C::kKeys - 1; j >= 0; --j) {
      typename C::T* const number = tile + Tile<typename C::T, C::D>::at(0, 0, j, c);
      if (finite(*number)) continue;
      found = key + j;
      clear_number(number);
    }
    first[c] = found;
  }
}

// NaN for the queries that see them.
template <int N> PFM_DEVICE void put_back(float (&x)[N][4], const int* first, int query, int column) {
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int e = 0; e < 4; ++e) {
      if (query + e / 2 * 8 >= first[column + 8 * n + e % 2]) x[n][e] = float_of(0x7fc00000u);
    }
  }
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    attention_forward_kernel(const AttentionForward p, int query_blocks) {
  using T = typename C::T;
  using Product = attention_device::Product<T>;
  constexpr int kQueries = C::kQueries, kKeys = C::kKeys, D = C::D, M = C::M;
  DYNAMIC_SHARED(T, q_tile);
  T* const dq_tile = q_tile + kQueries * D;  // where there is a tangent
  T* const k_tile = q_tile + (C::kTangent ? 2 : 1) * kQueries * D;
  T* const v_tile = k_tile + kKeys * D;
  T* const dk_tile = v_tile + kKeys * D;
  T* const dv_tile = dk_tile + (p.dk.data ? kKeys * D : 0);

  // The last queries of a head first: under a causal mask they see the most keys.
  const int block = query_blocks - 1 - static_cast<int>(blockIdx.x % static_cast<unsigned>(query_blocks));
  const int64_t sample_head = blockIdx.x / static_cast<unsigned>(query_blocks);
  const int64_t sample = sample_head / p.heads, head = sample_head % p.heads;
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  const int queries = static_cast<int>(p.queries), first_query = block * kQueries;
  const int keys = keys_of_sample(p, sample);
  const int keys_seen = p.causal ? min(keys, first_query + kQueries) : keys;
  const HeadRows<T> k = head_rows<T>(p.k, sample, kv_head), v = head_rows<T>(p.v, sample, kv_head);
  const HeadRows<T> dk = head_rows<T>(p.dk, sample, kv_head), dv = head_rows<T>(p.dv, sample, kv_head);

  const auto load = [&](T* tile, const HeadRows<T>& x, int first_key, int columns) {
    load_tile<T, kKeys, D, C::kThreads>(tile, x, first_key, keys, columns);
  };
  load_tile<T, kQueries, D, C::kThreads>(q_tile, head_rows<T>(p.q, sample, head), first_query, queries, p.head_dim);
  if constexpr (C::kTangent)
    load_tile<T, kQueries, D, C::kThreads>(dq_tile, head_rows<T>(p.dq, sample, head), first_query, queries, p.head_dim);
  if (keys_seen > 0) load(k_tile, k, 0, p.head_dim);
  if (C::kTangent && dk.data && keys_seen > 0) load(dk_tile, dk, 0, p.head_dim);
  async_commit();

  const int warp_row = warp_id() % C::kRowWarps * 16 * M, column0 = warp_id() / C::kRowWarps * C::kColumns;
  const int lane_row = first_query + warp_row + lane_id() / 4, lane_key = lane_id() % 4 * 2;
  const float scale = static_cast<float>(p.scale), scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
  float o[M][C::kColumns / 8][4], t[M][C::kColumns / 8][4];
  RowState<M> state;
  UNROLL
  for (int m = 0; m < M; ++m) {
    clear(o[m]);
    clear(t[m]);
    UNROLL
    for (int half = 0; half < 2; ++half) {
      state.maximum[m][half] = minus_infinity();
      state.total[m][half] = state.weighted[m][half] = 0.0f;
    }
  }

  NO_UNROLL
  for (int key = 0; key < keys_seen; key += kKeys) {
    async_wait<0>();
    __syncthreads();  // K is there, and V of the previous tile was read by all: V loads while S is formed
    load(v_tile, v, key, p.value_dim);
    if (C::kTangent && dv.data) load(dv_tile, dv, key, p.value_dim);
    async_commit();

    float s[M][kKeys / 8][4], ds[M][kKeys / 8][4], shrink[M][2];
    UNROLL
    for (int m = 0; m < M; ++m) {
      clear(s[m]);
      clear(ds[m]);
    }
    multiply_keys<C, C::kTangent>(s, ds, q_tile, dq_tile, k_tile, warp_row);
    if constexpr (C::kTangent) {
      if (dk.data) multiply_keys<C, false>(ds, ds, q_tile, nullptr, dk_tile, warp_row);
    }
    UNROLL
    for (int m = 0; m < M; ++m) {
      const int i = lane_row + 16 * m, j = key + lane_key;
      multiply(s[m], scale_log2, scale_log2);
      if constexpr (C::kTangent) multiply(ds[m], scale, scale);
      if (p.mask.data) apply_mask(s[m], p.mask, sample, head, i, j, queries, keys);
      if (key + kKeys > keys || (p.causal && key + kKeys > first_query + 1)) {
        const int end[2] = {p.causal ? min(keys, i + 1) : keys, p.causal ? min(keys, i + 9) : keys};
        hide_from(s[m], j, end);
      }
    }
    soften<C>(s, ds, &state, shrink);

    typename Product::Kept weights[M][kKeys / 16], weighted[M][kKeys / 16];
    bool grown = false;
    UNROLL
    for (int m = 0; m < M; ++m) {
      grown = grown || shrink[m][0] != 1.0f || shrink[m][1] != 1.0f;
      float sum[2] = {0.0f, 0.0f};
      UNROLL
      for (int n = 0; n < kKeys / 16; ++n) {
        Product::keep(&weights[m][n], s[m][2 * n], s[m][2 * n + 1]);
        if constexpr (C::kTangent) {
          Product::keep(&weighted[m][n], ds[m][2 * n], ds[m][2 * n + 1]);
          UNROLL
          for (int i = 0; i < 4; ++i) {
            float first, second;
            Product::kept_pair(weighted[m][n], i / 2, i % 2, &first, &second);
            sum[i % 2] += first + second;
          }
        }
      }
      UNROLL
      for (int half = 0; half < 2; ++half)
        state.weighted[m][half] = state.weighted[m][half] * shrink[m][half] + sum[half];
    }
    // After a few tiles the maximum of a row seldom grows.
    if (__any_sync(kWarp, grown)) {
      UNROLL
      for (int m = 0; m < M; ++m) {
        multiply(o[m], shrink[m][0], shrink[m][1]);
        if constexpr (C::kTangent) multiply(t[m], shrink[m][0], shrink[m][1]);
      }
    }

    async_wait<0>();
    __syncthreads();  // V is there, and K was read by all: the next K loads while O grows
    if (key + kKeys < keys_seen) {
      load(k_tile, k, key + kKeys, p.head_dim);
      if (C::kTangent && dk.data) load(dk_tile, dk, key + kKeys, p.head_dim);
    }
    async_commit();
    if (p.causal && key + kKeys > first_query + 1) {
      const bool d_values = C::kTangent && dv.data;
      bool fine = all_finite<C>(v_tile);
      if (d_values) fine = all_finite<C>(dv_tile) && fine;
      if (__syncthreads_or(!fine)) {
        SHARED(int, first, 2 * D);
        take_out<C>(first, v_tile, key);
        if (d_values) take_out<C>(first + D, dv_tile, key);
        __syncthreads();
        UNROLL
        for (int m = 0; m < M; ++m) {
          put_back(o[m], first, lane_row + 16 * m, column0 + lane_key);
          if constexpr (C::kTangent) put_back(t[m], first, lane_row + 16 * m, column0 + lane_key);
          if (d_values) put_back(t[m], first + D, lane_row + 16 * m, column0 + lane_key);
        }
      }
    }
    multiply_values<C, C::kTangent>(o, t, weights, weighted, v_tile, column0);
    if constexpr (C::kTangent) {
      if (dv.data) multiply_values<C, false>(t, t, weights, weights, dv_tile, column0);
    }
  }

  // ---- the tiles of Q and dQ, read by no one any more, put whole rows of the results together
  async_wait<0>();
  __syncthreads();
  UNROLL
  for (int m = 0; m < M; ++m) {
    float inverse[2], mean[2];
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(state.total[m][half]);
      inverse[half] = total == 0.0f ? 0.0f : 1.0f / total;
      mean[half] = C::kTangent ? row_sum(state.weighted[m][half]) * inverse[half] : 0.0f;
      const int i = lane_row + 16 * m + 8 * half;
      if (column0 == 0 && lane_key == 0 && i < queries) {
        const int64_t at = sample_head * p.queries + i;
        const float lse = total == 0.0f ? minus_infinity() : (state.maximum[m][half] + log2f(total)) * kLn2;
        if (p.lse) static_cast<float*>(p.lse)[at] = lse;
        if (C::kTangent && p.mu) static_cast<float*>(p.mu)[at] = mean[half];
      }
    }
    multiply(o[m], inverse[0], inverse[1]);
    place<T, D>(q_tile, warp_row + 16 * m, column0, o[m]);
    if constexpr (C::kTangent) {
      UNROLL
      for (int n = 0; n < C::kColumns / 8; ++n) {
        UNROLL
        for (int e = 0; e < 4; ++e) t[m][n][e] = t[m][n][e] * inverse[e / 2] - mean[e / 2] * o[m][n][e];
      }
      place<T, D>(dq_tile, warp_row + 16 * m, column0, t[m]);
    }
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  store_tile<T, kQueries, D, C::kThreads>(head_rows<T>(p.o, sample, head), q_tile, first_query, queries, p.value_dim,
                                          thread);
  if (C::kTangent && p.d_o.data)
    store_tile<T, kQueries, D, C::kThreads>(head_rows<T>(p.d_o, sample, head), dq_tile, first_query, queries,
                                            p.value_dim, thread);
}

}  // namespace attention_device
}  // namespace pyflowmap
