// attention_backward_kernel.h - the kernels of attention_backward.cu.
//
//   row_scalars_kernel     per query: lse in units of log 2, D and a, into the workspace
//   key_gradients_kernel   a block owns some keys and walks over the queries: gK, gV (gdK, gdV)
//   query_gradients_kernel a block owns some queries and walks over the keys: gQ (gdQ)
//
// Both recompute the scores: two products more (six through the tangent) than one kernel that adds to gQ by atomics, and
// in return every sum has one order and one owner. Warps divide a step's scores by queries and keys, and the gradients,
// which stay in registers throughout, by their rows and columns; the weights change hands through shared memory.
#pragma once
#include "attention/attention_backward_scores.h"

namespace pyflowmap {
namespace attention_device {
namespace {

constexpr int kScalarThreads = 128;

PFM_DEVICE float warp_sum(float x) {
  UNROLL
  for (int m = 16; m > 0; m >>= 1) x += __shfl_xor_sync(kWarp, x, m);
  return x;
}

// One warp per query.
template <class T> __global__ void __launch_bounds__(kScalarThreads)
    row_scalars_kernel(const __grid_constant__ BackwardArguments p, float* lse, float* D, float* a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kScalarThreads / 32) + warp_id();
  if (i >= p.batch * p.heads * p.queries) return;
  const int64_t token = i % p.queries, head = i / p.queries % p.heads, sample = i / p.queries / p.heads;
  const auto at = [&](const Rows& x) { return x.data ? row<T>(x, sample, head, token) : nullptr; };
  const T *const o = at(p.o), *const d_o = at(p.d_o), *const go = at(p.go), *const gdo = at(p.gdo);
  float with_o = 0.0f, with_tangent = 0.0f, gdo_o = 0.0f;
  for (int c = lane_id(); c < p.value_dim; c += 32) {
    const float value = to_float(o[c]);
    if (go) with_o += to_float(go[c]) * value;
    if (gdo) {
      with_tangent += to_float(gdo[c]) * to_float(d_o[c]);
      gdo_o += to_float(gdo[c]) * value;
    }
  }
  with_o = warp_sum(with_o);
  if (gdo) {
    with_tangent = warp_sum(with_tangent);
    gdo_o = warp_sum(gdo_o);
  }
  if (lane_id() != 0) return;
  const float sum = static_cast<const float*>(p.lse)[i];
  lse[i] = sum == minus_infinity() ? -sum : sum * kLog2E;
  D[i] = gdo ? with_o + (with_tangent - gdo_o * static_cast<const float*>(p.mu)[i]) : with_o;
  if (gdo) a[i] = gdo_o;
}

// kOwned     rows a block owns: keys for the gradients of keys, else queries
// kWalked    rows of the other kind that it takes in a step
// kStages    buffers for these: with two the next step's are on their way during this one
template <class T_, int kDim, bool kKeys, bool kBoth_, int kOwned_, int kWalked_, int kWarps_, int kStages_>
struct Backward {
  using T = T_;
  static constexpr bool kBoth = kBoth_;
  static constexpr int D = kDim, kOwned = kOwned_, kWalked = kWalked_, kStages = kStages_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kKinds = kBoth ? 4 : 2;                  // tensors of queries, and of keys
  static constexpr int kWeights = kKeys ? kKinds : kKinds / 2;  // P, gS (dP, gdS), or gS (gdS)
  static constexpr int kQueries = kKeys ? kWalked : kOwned, kKeyColumns = kKeys ? kOwned : kWalked;
  static constexpr int kOwnedTile = kOwned * D, kWalkedTile = kWalked * D, kWeightTile = kQueries * kKeyColumns;
  static constexpr size_t kBytes =
      sizeof(T) * (kKinds * kOwnedTile + kStages * kKinds * kWalkedTile + kWeights * kWeightTile);

  // Scores: kQueries / 16 warps down, the others across. Gradients: kOwned / 16 down.
  static constexpr int kScoreRows = kQueries / 16, kScoreShare = kKeyColumns * kScoreRows / kWarps / 8;
  static constexpr int kScoreN = kScoreShare < 2 ? 2 : kScoreShare;  // of 16 columns at least; some warps may have none
  static constexpr int kSumRows = kOwned / 16, kSumN = D * kSumRows / kWarps / 8;
  static_assert(kOwned % 16 == 0 && kWalked % 16 == 0, "a product takes 16 rows");
  static_assert(kWarps % kSumRows == 0 && kSumN % 2 == 0 && kSumN > 0, "warps divide the gradients in 16 columns each");
  static_assert(kWarps % kScoreRows == 0 && kScoreN % 2 == 0, "warps divide the scores in 16 columns each");
};

// A tensor's rows of one head in a tile of the group: kinds in the order of QueryTiles and KeyTiles.
template <class K, int kRows>
PFM_DEVICE void load_group(typename K::T* tiles, const Rows* const (&kinds)[4], const int (&columns)[2], int64_t sample,
                           int64_t head, int first, int end) {
  using T = typename K::T;
  UNROLL
  for (int i = 0; i < K::kKinds; ++i) {
    if (!kinds[i]->data) continue;
    load_tile<T, kRows, K::D, K::kThreads>(tiles + i * kRows * K::D, head_rows<T>(*kinds[i], sample, head), first, end,
                                           columns[i % 2]);
  }
}

template <class K> PFM_DEVICE QueryTiles<typename K::T> query_tiles(const typename K::T* tiles, int tile) {
  return {tiles, tiles + tile, tiles + (K::kBoth ? 2 * tile : 0), tiles + (K::kBoth ? 3 * tile : 0)};
}
template <class K> PFM_DEVICE KeyTiles<typename K::T> key_tiles(const typename K::T* tiles, int tile) {
  return {tiles, tiles + tile, tiles + (K::kBoth ? 2 * tile : 0), tiles + (K::kBoth ? 3 * tile : 0)};
}

// The weights of a step into their tiles: gS (gdS), then P (dP) where `kWithP`.
template <class K, bool kWithP>
PFM_DEVICE void score(typename K::T* weights, const QueryTiles<typename K::T>& queries,
                      const KeyTiles<typename K::T>& keys, const BackwardArguments& p, const Present& has,
                      const Place& at, const LaneScalars& lane) {
  using T = typename K::T;
  constexpr int N = K::kScoreN, kWidth = K::kKeyColumns, kTile = K::kWeightTile, kHalf = K::kKinds / 2;
  float s[N][4] = {}, ds[K::kBoth ? N : 1][4] = {}, x[N][4] = {}, y[K::kBoth ? N : 1][4] = {};
  multiply<T, K::D, K::kBoth>(s, ds, x, y, queries, keys, at, has, p.head_dim, p.value_dim);
  weigh<K::kBoth>(s, ds, x, y, p, at, lane);
  place<T, kWidth>(weights, at.row0, at.column0, x);
  if constexpr (K::kBoth) place<T, kWidth>(weights + kTile, at.row0, at.column0, y);
  if constexpr (kWithP) {
    place<T, kWidth>(weights + kHalf * kTile, at.row0, at.column0, s);
    if constexpr (K::kBoth) place<T, kWidth>(weights + (kHalf + 1) * kTile, at.row0, at.column0, ds);
  }
}

// A gradient leaves through the tile of the tensor it belongs to. Rows from `end` on are hidden keys: zero.
template <class K>
PFM_DEVICE void place_gradient(typename K::T* tile, float (&x)[K::kSumN][4], float scale, int row0, int column0,
                               int end) {
  UNROLL
  for (int n = 0; n < K::kSumN; ++n) {
    UNROLL
    for (int e = 0; e < 4; ++e) x[n][e] = row0 + lane_id() / 4 + e / 2 * 8 < end ? x[n][e] * scale : 0.0f;
  }
  place<typename K::T, K::D>(tile, row0, column0, x);
}

template <class K>
PFM_DEVICE void store_gradient(const Rows& x, const typename K::T* tile, int64_t sample, int64_t head, int first,
                               int64_t tokens, int columns) {
  using T = typename K::T;
  if (!x.data) return;
  store_tile<T, K::kOwned, K::D, K::kThreads>(head_rows<T>(x, sample, head), tile, first, static_cast<int>(tokens),
                                              columns, static_cast<int>(threadIdx.x));
}

template <class K, int kResident>
__global__ void __launch_bounds__(K::kThreads, kResident)
    key_gradients_kernel(const __grid_constant__ BackwardArguments p) {
  using T = typename K::T;
  constexpr int kTile = K::kOwnedTile, kOther = K::kWalkedTile, kWeight = K::kWeightTile, kHalf = K::kKinds / 2;
  DYNAMIC_SHARED(T, shared);
  T* const owned = shared;
  T* const walked = owned + K::kKinds * kTile;
  T* const weights = walked + K::kStages * K::kKinds * kOther;

  const int blocks = static_cast<int>((p.keys + K::kOwned - 1) / K::kOwned);
  const int first = static_cast<int>(blockIdx.x) % blocks * K::kOwned;
  const int64_t pair = blockIdx.x / static_cast<unsigned>(blocks);
  const int64_t sample = pair / p.kv_heads, kv_head = pair % p.kv_heads;
  const int end = keys_of_sample(p, sample), queries = static_cast<int>(p.queries);
  const int sharing = static_cast<int>(p.heads / p.kv_heads);
  const int columns[2] = {p.head_dim, p.value_dim};
  const Present has = present(p);
  const Rows* const query_kinds[4] = {&p.q, &p.go, &p.dq, &p.gdo};
  const Rows* const key_kinds[4] = {&p.k, &p.v, &p.dk, &p.dv};

  // A query before the first key of the block sees none of it.
  const int from = p.causal ? first / K::kWalked : 0;
  const int per_head = (queries + K::kWalked - 1) / K::kWalked - from;
  const int steps = first < end && per_head > 0 ? per_head * sharing : 0;
  const auto load_step = [&](int step) {
    load_group<K, K::kWalked>(walked + step % K::kStages * K::kKinds * kOther, query_kinds, columns, sample,
                              kv_head * sharing + step / per_head, (from + step % per_head) * K::kWalked, queries);
    async_commit();
  };

  float gk[K::kSumN][4] = {}, gdk[K::kBoth ? K::kSumN : 1][4] = {};
  float gv[K::kSumN][4] = {}, gdv[K::kBoth ? K::kSumN : 1][4] = {};
  const int score_row = warp_id() % K::kScoreRows * 16, score_column = warp_id() / K::kScoreRows * K::kScoreN * 8;
  const int sum_row = warp_id() % K::kSumRows * 16, sum_column = warp_id() / K::kSumRows * K::kSumN * 8;
  if (steps > 0) {
    load_group<K, K::kOwned>(owned, key_kinds, columns, sample, kv_head, first, end);
    load_step(0);
  }
  NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    async_wait<0>();
    __syncthreads();  // this step's tiles are there; the other buffer and the weights are no longer read
    if (K::kStages == 2 && step + 1 < steps) load_step(step + 1);
    const QueryTiles<T> q = query_tiles<K>(walked + step % K::kStages * K::kKinds * kOther, kOther);
    const int query = (from + step % per_head) * K::kWalked;
    const Place at = {sample, kv_head * sharing + step / per_head, score_row, score_column, query, first, end};
    if (score_column < K::kKeyColumns) {
      const LaneScalars lane = lane_scalars<K::kBoth>(p, sample, at.head, query + score_row);
      score<K, true>(weights, q, key_tiles<K>(owned, kTile), p, has, at, lane);
    }
    __syncthreads();
    const auto sum = [&](auto& g, auto& gd, const T* u, const T* w, const T* x, const T* dx, bool has_dx, bool second,
                         int dim) {
      accumulate<T, K::D, K::kWalked, K::kKeyColumns, true, K::kBoth>(g, gd, u, w, x, dx, has_dx, second, sum_row,
                                                                      sum_column, dim);
    };
    const T* const P = weights + kHalf * kWeight;
    if (p.gk.data || p.gdk.data) {
      sum(gk, gdk, weights, weights + kWeight, q.q, q.dq, has.dq, p.gdk.data != nullptr, p.head_dim);
    }
    if (p.gv.data || p.gdv.data) {
      if constexpr (K::kBoth) {
        sum(gv, gdv, P + kWeight, P, q.gdo, q.go, has.go, p.gdv.data != nullptr, p.value_dim);
      } else {
        sum(gv, gdv, P, P, q.go, q.go, false, false, p.value_dim);
      }
    }
    if (K::kStages == 1 && step + 1 < steps) {
      __syncthreads();
      load_step(step + 1);
    }
  }

  __syncthreads();  // the last step's tiles are no longer read
  const float scale = static_cast<float>(p.scale);
  place_gradient<K>(owned, gk, scale, sum_row, sum_column, end - first);
  place_gradient<K>(owned + kTile, gv, 1.0f, sum_row, sum_column, end - first);
  if constexpr (K::kBoth) {
    place_gradient<K>(owned + 2 * kTile, gdk, scale, sum_row, sum_column, end - first);
    place_gradient<K>(owned + 3 * kTile, gdv, 1.0f, sum_row, sum_column, end - first);
  }
  __syncthreads();
  store_gradient<K>(p.gk, owned, sample, kv_head, first, p.keys, p.head_dim);
  store_gradient<K>(p.gv, owned + kTile, sample, kv_head, first, p.keys, p.value_dim);
  if constexpr (K::kBoth) {
    store_gradient<K>(p.gdk, owned + 2 * kTile, sample, kv_head, first, p.keys, p.head_dim);
    store_gradient<K>(p.gdv, owned + 3 * kTile, sample, kv_head, first, p.keys, p.value_dim);
  }
}

template <class K, int kResident>
__global__ void __launch_bounds__(K::kThreads, kResident)
    query_gradients_kernel(const __grid_constant__ BackwardArguments p) {
  using T = typename K::T;
  constexpr int kTile = K::kOwnedTile, kOther = K::kWalkedTile;
  DYNAMIC_SHARED(T, shared);
  T* const owned = shared;
  T* const walked = owned + K::kKinds * kTile;
  T* const weights = walked + K::kStages * K::kKinds * kOther;

  const int queries = static_cast<int>(p.queries), blocks = (queries + K::kOwned - 1) / K::kOwned;
  // Under a causal mask the last queries see the most keys: they start first.
  const int first = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * K::kOwned;
  const int64_t pair = blockIdx.x / static_cast<unsigned>(blocks);
  const int64_t sample = pair / p.heads, head = pair % p.heads, kv_head = head / (p.heads / p.kv_heads);
  const int end = keys_of_sample(p, sample);
  const int columns[2] = {p.head_dim, p.value_dim};
  const Present has = present(p);
  const Rows* const query_kinds[4] = {&p.q, &p.go, &p.dq, &p.gdo};
  const Rows* const key_kinds[4] = {&p.k, &p.v, &p.dk, &p.dv};

  const int seen = p.causal ? min(end, first + K::kOwned) : end;
  const int steps = (seen + K::kWalked - 1) / K::kWalked;
  const auto load_step = [&](int step) {
    load_group<K, K::kWalked>(walked + step % K::kStages * K::kKinds * kOther, key_kinds, columns, sample, kv_head,
                              step * K::kWalked, end);
    async_commit();
  };

  float gq[K::kSumN][4] = {}, gdq[K::kBoth ? K::kSumN : 1][4] = {};
  const int score_row = warp_id() % K::kScoreRows * 16, score_column = warp_id() / K::kScoreRows * K::kScoreN * 8;
  const int sum_row = warp_id() % K::kSumRows * 16, sum_column = warp_id() / K::kSumRows * K::kSumN * 8;
  const LaneScalars lane = lane_scalars<K::kBoth>(p, sample, head, first + score_row);
  if (steps > 0) {
    load_group<K, K::kOwned>(owned, query_kinds, columns, sample, head, first, queries);
    load_step(0);
  }
  NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    async_wait<0>();
    __syncthreads();  // this step's tiles are there; the other buffer and the weights are no longer read
    if (K::kStages == 2 && step + 1 < steps) load_step(step + 1);
    const KeyTiles<T> k = key_tiles<K>(walked + step % K::kStages * K::kKinds * kOther, kOther);
    const Place at = {sample, head, score_row, score_column, first, step * K::kWalked, end};
    if (score_column < K::kKeyColumns) { score<K, false>(weights, query_tiles<K>(owned, kTile), k, p, has, at, lane); }
    __syncthreads();
    accumulate<T, K::D, K::kWalked, K::kKeyColumns, false, K::kBoth>(
        gq, gdq, weights, weights + (K::kBoth ? K::kWeightTile : 0), k.k, k.dk, has.dk, p.gdq.data != nullptr, sum_row,
        sum_column, p.head_dim);
    if (K::kStages == 1 && step + 1 < steps) {
      __syncthreads();
      load_step(step + 1);
    }
  }

  __syncthreads();  // the last step's tiles are no longer read
  const float scale = static_cast<float>(p.scale);
  place_gradient<K>(owned, gq, scale, sum_row, sum_column, K::kOwned);
  if constexpr (K::kBoth) place_gradient<K>(owned + 2 * kTile, gdq, scale, sum_row, sum_column, K::kOwned);
  __syncthreads();
  store_gradient<K>(p.gq, owned, sample, head, first, p.queries, p.head_dim);
  if constexpr (K::kBoth) store_gradient<K>(p.gdq, owned + 2 * kTile, sample, head, first, p.queries, p.head_dim);
}

}  // namespace
}  // namespace attention_device
}  // namespace pyflowmap
