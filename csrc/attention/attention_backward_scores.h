// attention_backward_scores.h - what both kernels of the backward pass share: the gradients of the scores.
//
// Of 16 queries and 8 N keys a warp recomputes S (and dS), multiplies go (and gdo) with V (and dV), and combines the
// four with the row scalars into the weights that the gradients are sums of (contract: attention.h):
//
//   through O           P, gS = P * (go V' - D)
//   through O and dO    P, dP = P * (dS - mu), gdS = P * (gdo V' - a),
//                       gS = P * (go V' + gdo dV' + gdo V' * (dS - mu) - a * dS - D)
//
// They pass through shared memory, rounded to T, because the products that follow divide a block's warps otherwise.
#pragma once
#include "attention/attention_tile.h"

namespace pyflowmap {
namespace attention_device {

// A row's: lse in units of log 2 (plus infinity for a query that sees nothing: its weights become 0), D, a. `mu` is the
// forward pass's own.
struct RowScalars { const float *lse, *D, *a, *mu; };

struct BackwardArguments : AttentionBackward { RowScalars rows; };

// What is given. The others are not read, and products with them not made.
struct Present { bool dq, dk, dv, go; };

PFM_DEVICE Present present(const BackwardArguments& p) {
  return {p.dq.data != nullptr, p.dk.data != nullptr, p.dv.data != nullptr, p.go.data != nullptr};
}

// The tiles of some queries and of some keys; only the first two of each where the gradient is through O alone.
template <class T> struct QueryTiles { const T *q, *go, *dq, *gdo; };
template <class T> struct KeyTiles { const T *k, *v, *dk, *dv; };

// The scalars of this lane's two rows of an accumulator.
struct LaneScalars { float lse[2], D[2], a[2], mu[2]; };

template <bool kBoth>
PFM_DEVICE LaneScalars lane_scalars(const BackwardArguments& p, int64_t sample, int64_t head, int row0) {
  const int64_t start = (sample * p.heads + head) * p.queries;
  LaneScalars lane = {};
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int i = row0 + lane_id() / 4 + 8 * half;
    const bool inside = i < p.queries;
    lane.lse[half] = inside ? p.rows.lse[start + i] : -minus_infinity();
    lane.D[half] = inside ? p.rows.D[start + i] : 0.0f;
    if constexpr (kBoth) {
      lane.a[half] = inside ? p.rows.a[start + i] : 0.0f;
      lane.mu[half] = inside ? p.rows.mu[start + i] : 0.0f;
    }
  }
  return lane;
}

// Where a warp's block of scores lies: in the tiles (row0, column0), and in the problem.
struct Place {
  int64_t sample, head;
  int row0, column0;  // of the tiles
  int query, key;     // of the tiles' first row
  int end;            // keys of the sample
};

PFM_DEVICE int round_up_16(int n) { return (n + 15) / 16 * 16; }

// x (and y) become the weights: P in s, dP in ds, gS in x, gdS in y.
template <bool kBoth, int N>
PFM_DEVICE void weigh(float (&s)[N][4], float (&ds)[kBoth ? N : 1][4], float (&x)[N][4], float (&y)[kBoth ? N : 1][4],
                      const BackwardArguments& p, const Place& at, const LaneScalars& lane) {
  const float scale = static_cast<float>(p.scale), scale2 = static_cast<float>(p.scale * double{kLog2E});
  const int query = at.query + at.row0 + lane_id() / 4, key = at.key + at.column0 + lane_id() % 4 * 2;
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int e = 0; e < 4; ++e) s[n][e] *= scale2;
  }
  const int last = at.key + at.column0 + 8 * N - 1;
  if (last >= at.end || (p.causal && last > at.query + at.row0)) {
    int end[2] = {at.end, at.end};
    UNROLL
    for (int half = 0; half < 2; ++half) {
      if (p.causal) end[half] = min(at.end, query + 8 * half + 1);
    }
    hide_from(s, key, end);
  }
  if (p.mask.data) {
    apply_mask(s, p.mask, at.sample, at.head, query, key, static_cast<int>(p.queries), static_cast<int>(p.keys));
  }
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2;
      const float weight = exp2_approximate(s[n][e] - lane.lse[half]);
      const bool hidden = weight == 0.0f;  // times whatever a hidden key holds, NaN included
      s[n][e] = weight;
      if constexpr (kBoth) {
        const float tangent = ds[n][e] * scale, centred = tangent - lane.mu[half];
        const float g = x[n][e] + (y[n][e] * centred - (lane.a[half] * tangent + lane.D[half]));
        ds[n][e] = hidden ? 0.0f : weight * centred;
        x[n][e] = hidden ? 0.0f : weight * g;
        y[n][e] = hidden ? 0.0f : weight * (y[n][e] - lane.a[half]);
      } else {
        x[n][e] = hidden ? 0.0f : weight * (x[n][e] - lane.D[half]);
      }
    }
  }
}

// The four products of 16 queries and 8 N keys: S, dS, X = go V' + gdo dV', Y = gdo V'.
template <class T, int D, bool kBoth, int N>
PFM_DEVICE void multiply(float (&s)[N][4], float (&ds)[kBoth ? N : 1][4], float (&x)[N][4],
                         float (&y)[kBoth ? N : 1][4], const QueryTiles<T>& queries, const KeyTiles<T>& keys,
                         const Place& at, const Present& has, int head_dim, int value_dim) {
  static_assert(N % 2 == 0, "keys come 16 at a time");
  using M = Product<T>;
  NO_UNROLL
  for (int c = 0; c < head_dim; c += 16) {
    typename M::A q, dq;
    M::template load_a<D>(&q, queries.q, at.row0, c);
    if constexpr (kBoth) {
      if (has.dq) M::template load_a<D>(&dq, queries.dq, at.row0, c);
    }
    UNROLL
    for (int n = 0; n < N; n += 2) {
      typename M::B k[2];
      M::template load_b<D>(k, keys.k, at.column0 + 8 * n, c);
      UNROLL
      for (int i = 0; i < 2; ++i) M::add(s[n + i], q, k[i]);
      if constexpr (kBoth) {
        if (has.dq) {
          UNROLL
          for (int i = 0; i < 2; ++i) M::add(ds[n + i], dq, k[i]);
        }
        if (has.dk) {
          M::template load_b<D>(k, keys.dk, at.column0 + 8 * n, c);
          UNROLL
          for (int i = 0; i < 2; ++i) M::add(ds[n + i], q, k[i]);
        }
      }
    }
  }
  NO_UNROLL
  for (int c = 0; c < value_dim; c += 16) {
    typename M::A go, gdo;
    if (!kBoth || has.go) M::template load_a<D>(&go, queries.go, at.row0, c);
    if constexpr (kBoth) M::template load_a<D>(&gdo, queries.gdo, at.row0, c);
    UNROLL
    for (int n = 0; n < N; n += 2) {
      typename M::B v[2];
      M::template load_b<D>(v, keys.v, at.column0 + 8 * n, c);
      if (!kBoth || has.go) {
        UNROLL
        for (int i = 0; i < 2; ++i) M::add(x[n + i], go, v[i]);
      }
      if constexpr (kBoth) {
        UNROLL
        for (int i = 0; i < 2; ++i) M::add(y[n + i], gdo, v[i]);
        if (has.dv) {
          M::template load_b<D>(v, keys.dv, at.column0 + 8 * n, c);
          UNROLL
          for (int i = 0; i < 2; ++i) M::add(x[n + i], gdo, v[i]);
        }
      }
    }
  }
}

// ---- the sums over weights ------------------------------------------------------------------------------------------

// 16 rows and 8 N columns of a gradient and its tangent's, over kTerms terms:
//   first += U X + W dX        second += W X        (through O alone: first += U X)
// U, W: tiles of weights, kWidth columns wide, transposed where the rows of the gradient are its columns.
template <class T, int D, int kTerms, int kWidth, bool kTransposed, bool kBoth, int N>
PFM_DEVICE void accumulate(float (&first)[N][4], float (&second)[kBoth ? N : 1][4], const T* u, const T* w, const T* x,
                           const T* dx, bool has_dx, bool wants_second, int row0, int column0, int columns) {
  static_assert(N % 2 == 0, "columns come 16 at a time");
  using M = Product<T>;
  UNROLL
  for (int term = 0; term < kTerms; term += 16) {
    typename M::A a, b;
    if constexpr (kTransposed) {
      M::template load_a_transposed<kWidth>(&a, u, term, row0);
      if constexpr (kBoth) M::template load_a_transposed<kWidth>(&b, w, term, row0);
    } else {
      M::template load_a<kWidth>(&a, u, row0, term);
      if constexpr (kBoth) M::template load_a<kWidth>(&b, w, row0, term);
    }
    UNROLL
    for (int n = 0; n < N; n += 2) {
      if (column0 + 8 * n >= columns) continue;
      typename M::B factor[2];
      M::template load_b_transposed<D>(factor, x, term, column0 + 8 * n);
      UNROLL
      for (int i = 0; i < 2; ++i) M::add(first[n + i], a, factor[i]);
      if constexpr (kBoth) {
        if (wants_second) {
          UNROLL
          for (int i = 0; i < 2; ++i) M::add(second[n + i], b, factor[i]);
        }
        if (has_dx) {
          M::template load_b_transposed<D>(factor, dx, term, column0 + 8 * n);
          UNROLL
          for (int i = 0; i < 2; ++i) M::add(first[n + i], b, factor[i]);
        }
      }
    }
  }
}

}  // namespace attention_device
}  // namespace pyflowmap
