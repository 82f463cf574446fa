// attention_backward_isa.cpp - the backward loops of attention on the CPU, through O alone or through O and dO.
// Compiled once per instruction set, as attention_isa.cpp is. Contract, and the formulas: attention.h.
//
// A unit is a run of key blocks of one head of keys: it owns the gradients of those keys, and walks the heads that
// share them, the key blocks, the query blocks. P and the gradients of the scores are formed again from lse and mu. The
// gradient of Q adds up over key blocks in the thread's scratch, or, where a head has several runs, in partial sums
// that a second pass adds in the order of the runs.
#include "attention/attention_isa.h"
#include "attention/attention_rows.h"
#include "attention/attention_scores.h"

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

// From tiles of scores to the weights and the gradients of the scores, in place, for one row of n seen keys.
//   s: c S + mask -> P       y: go V' (+ gdo dV') -> gS       ds: dS -> dP       x: gdo V' -> gdS
template <class A, bool kBoth>
PFM_INLINE void weigh_row(A* __restrict s, A* __restrict y, A* __restrict ds, A* __restrict x, int n, int width,
                          A scale, A scale_tangent, A lse, A delta, A mu, A a) {
  constexpr int kL = kLanes<A>;
  const int used = n > 0 && lse != kHidden<A> ? round_up(n, kL) : 0;
  const size_t rest = static_cast<size_t>(width - used) * sizeof(A);
  memset(s + used, 0, rest);
  memset(y + used, 0, rest);
  if (kBoth) memset(ds + used, 0, rest);
  if (kBoth) memset(x + used, 0, rest);
  for (int j = 0; j < used; j += kL) {
    Vector<A> score = load(s + j) * scale;
    for (int i = n - j; i < kL; ++i) {  // the last vector only
      score[i] = kHidden<A>;
      y[j + i] = A(0);
      if (kBoth) ds[j + i] = x[j + i] = A(0);
    }
    const Vector<A> weight = exponential(score - lse);
    put(s + j, weight);
    const Vector<A> gradient = weight * (load(y + j) - delta);
    if (kBoth) {
      const Vector<A> shift = load(ds + j) * scale_tangent - mu;
      const Vector<A> of_tangent = weight * (load(x + j) - a);
      put(ds + j, weight * shift);
      put(x + j, of_tangent);
      put(y + j, gradient + of_tangent * shift);
    } else {
      put(y + j, gradient);
    }
  }
}

template <class A> struct Backward {
  const AttentionBackward& p;
  const AttentionPlan& plan;
  const bool both, has_dq, has_dk, has_dv;
  const A scale;
  const int pitch_d, pitch_v, pitch_s, pitch_gq;
  const int64_t run_keys;
  A *q, *dq, *go, *gdo, *k, *dk, *kt, *dkt, *vt, *dvt, *rows, *s, *y, *ds, *x;
  A *lse, *mu, *a, *delta;  // of all queries of a head
  A *gq, *gdq, *gk, *gv, *gdk, *gdv;

  Backward(const AttentionBackward& problem, const AttentionPlan& cut)
      : p(problem), plan(cut), both(static_cast<bool>(p.gdo)), has_dq(both && p.dq), has_dk(both && p.dk),
        has_dv(both && p.dv), scale(static_cast<A>(p.scale)),
        pitch_d(pitch_of<A>(p.head_dim)), pitch_v(pitch_of<A>(p.value_dim)), pitch_s(pitch_of<A>(plan.key_block)),
        pitch_gq(plan.partial ? plan.partial_pitch : pitch_d), run_keys(plan.blocks_per_run * plan.key_block) {}

  int64_t place(char* base) {
    Scratch scratch(base);
    const int queries = plan.query_block, keys = plan.key_block;
    q = scratch.tile<A>(queries, pitch_d);
    dq = scratch.tile<A>(queries, pitch_d, has_dq);
    go = scratch.tile<A>(queries, pitch_v, static_cast<bool>(p.go));
    gdo = scratch.tile<A>(queries, pitch_v, both);
    k = scratch.tile<A>(keys, pitch_d);
    dk = scratch.tile<A>(keys, pitch_d, has_dk);
    kt = scratch.tile<A>(p.head_dim, pitch_s);
    dkt = scratch.tile<A>(p.head_dim, pitch_s, has_dk);
    vt = scratch.tile<A>(p.value_dim, pitch_s);
    dvt = scratch.tile<A>(p.value_dim, pitch_s, has_dv);
    rows = scratch.take<A>(int64_t{keys} * pitch_v + pitch_d);
    s = scratch.tile<A>(queries, pitch_s);
    y = scratch.tile<A>(queries, pitch_s);
    ds = scratch.tile<A>(queries, pitch_s, both);
    x = scratch.tile<A>(queries, pitch_s, both);
    lse = scratch.take<A>(p.queries);
    mu = scratch.take<A>(p.queries);
    a = scratch.take<A>(p.queries);
    delta = scratch.take<A>(p.queries);
    gk = scratch.tile<A>(run_keys, pitch_d, static_cast<bool>(p.gk));
    gv = scratch.tile<A>(run_keys, pitch_v, static_cast<bool>(p.gv));
    gdk = scratch.tile<A>(run_keys, pitch_d, both && p.gdk);
    gdv = scratch.tile<A>(run_keys, pitch_v, both && p.gdv);
    gq = scratch.tile<A>(p.queries, pitch_d, p.gq && !plan.partial);
    gdq = scratch.tile<A>(p.queries, pitch_d, both && p.gdq && !plan.partial);
    return scratch.used();
  }

  void unit(int64_t index) {
    const int64_t run = index % plan.runs, kv_head = index / plan.runs % p.kv_heads;
    const int64_t sample = index / plan.runs / p.kv_heads, group = p.heads / p.kv_heads;
    const int64_t begin = run * run_keys, end = begin + run_keys < p.keys ? begin + run_keys : p.keys;
    const int64_t seen = keys_seen(p, sample) < end ? keys_seen(p, sample) : end;
    clear(gk, end - begin, pitch_d);
    clear(gv, end - begin, pitch_v);
    clear(gdk, end - begin, pitch_d);
    clear(gdv, end - begin, pitch_v);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      if (plan.partial) find_partial(run, sample, head);
      clear(gq, p.queries, pitch_gq);
      clear(gdq, p.queries, pitch_gq);
      if (begin < seen) scalars(sample, head);
      for (int64_t key = begin; key < seen; key += plan.key_block) {
        const int count = static_cast<int>(seen - key < plan.key_block ? seen - key : plan.key_block);
        keys_of(sample, kv_head, key, count);
        const int64_t from = p.causal ? key / plan.query_block * plan.query_block : 0;
        for (int64_t first = from; first < p.queries; first += plan.query_block) {
          const int64_t left = p.queries - first;
          const int queries = static_cast<int>(left < plan.query_block ? left : plan.query_block);
          queries_of(sample, head, first, queries);
          scores(sample, head, first, queries, key, count);
          gradients(first, queries, key, count, key - begin);
        }
      }
      if (!plan.partial) {
        give(p.gq, gq, pitch_d, sample, head, 0, p.queries, p.head_dim, scale);
        give(p.gdq, gdq, pitch_d, sample, head, 0, p.queries, p.head_dim, scale);
      }
    }
    give(p.gk, gk, pitch_d, sample, kv_head, begin, end, p.head_dim, scale);
    give(p.gv, gv, pitch_v, sample, kv_head, begin, end, p.value_dim, A(1));
    give(p.gdk, gdk, pitch_d, sample, kv_head, begin, end, p.head_dim, scale);
    give(p.gdv, gdv, pitch_v, sample, kv_head, begin, end, p.value_dim, A(1));
  }

  static void clear(A* tile, int64_t height, int pitch) {
    if (tile) memset(tile, 0, static_cast<size_t>(height * pitch) * sizeof(A));
  }

  void find_partial(int64_t run, int64_t sample, int64_t head) {
    const int64_t one = p.batch * p.heads * p.queries * pitch_gq;
    A* at = static_cast<A*>(plan.partial) + run * one + (sample * p.heads + head) * p.queries * pitch_gq;
    gq = p.gq ? at : nullptr;
    gdq = both && p.gdq ? at + plan.runs * one : nullptr;
  }

  // A gradient nobody has a term for is zero all the same.
  void give(const Rows& to, A* from, int pitch, int64_t sample, int64_t head, int64_t begin, int64_t end, int columns,
            A factor) {
    if (!to) return;
    for (int64_t i = begin; i < end; ++i) {
      A* row = from ? from + (i - begin) * pitch : rows;
      if (!from) clear(rows, 1, round_up(columns, kLanes<A>));
      for (int c = 0; c < columns; ++c) row[c] *= factor;
      store_row(to, sample, head, i, row, columns);
    }
  }

  // What each query needs beside its rows: lse, mu, a = gdo . O, delta = go . O + gdo . dO (the D of the contract + a mu).
  void scalars(int64_t sample, int64_t head) {
    const int64_t at = (sample * p.heads + head) * p.queries;
    const int n = p.value_dim;
    A *o = rows, *d_o = rows + pitch_v, *g = rows + 2 * pitch_v, *gd = rows + 3 * pitch_v;
    for (int64_t i = 0; i < p.queries; ++i) {
      lse[i] = static_cast<const A*>(p.lse)[at + i];
      mu[i] = both ? static_cast<const A*>(p.mu)[at + i] : A(0);
      pack(p.o, sample, head, i, 1, 1, n, o, pitch_v);
      pack(p.go, sample, head, i, 1, 1, n, g, pitch_v);
      delta[i] = dot(o, g, n);
      a[i] = A(0);
      if (!both) continue;
      pack(p.d_o, sample, head, i, 1, 1, n, d_o, pitch_v);
      pack(p.gdo, sample, head, i, 1, 1, n, gd, pitch_v);
      a[i] = dot(o, gd, n);
      delta[i] += dot(d_o, gd, n);
    }
  }

  static A dot(const A* u, const A* w, int n) {
    Vector<A> sum = {};
    for (int i = 0; i < round_up(n, kLanes<A>); i += kLanes<A>) sum += load(u + i) * load(w + i);
    A lanes[kLanes<A>];
    put(lanes, sum);
    return total(lanes);
  }

  void keys_of(int64_t sample, int64_t head, int64_t key, int count) {
    pack(p.k, sample, head, key, count, count, p.head_dim, k, pitch_d);
    transpose(k, pitch_d, count, p.head_dim, kt, pitch_s);
    if (has_dk) {
      pack(p.dk, sample, head, key, count, count, p.head_dim, dk, pitch_d);
      transpose(dk, pitch_d, count, p.head_dim, dkt, pitch_s);
    }
    pack(p.v, sample, head, key, count, count, p.value_dim, rows, pitch_v);
    transpose(rows, pitch_v, count, p.value_dim, vt, pitch_s);
    if (has_dv) {
      pack(p.dv, sample, head, key, count, count, p.value_dim, rows, pitch_v);
      transpose(rows, pitch_v, count, p.value_dim, dvt, pitch_s);
    }
  }

  void queries_of(int64_t sample, int64_t head, int64_t first, int queries) {
    pack(p.q, sample, head, first, queries, queries, p.head_dim, q, pitch_d);
    if (has_dq) pack(p.dq, sample, head, first, queries, queries, p.head_dim, dq, pitch_d);
    if (go) pack(p.go, sample, head, first, queries, queries, p.value_dim, go, pitch_v);
    if (both) pack(p.gdo, sample, head, first, queries, queries, p.value_dim, gdo, pitch_v);
    for (int r = 0; r < queries; ++r) {
      if (lse[first + r] != kHidden<A>) continue;
      clear(q + r * pitch_d, 1, pitch_d);  // sees nothing: whatever it holds does not reach a key
      if (has_dq) clear(dq + r * pitch_d, 1, pitch_d);
      if (go) clear(go + r * pitch_v, 1, pitch_v);
      if (both) clear(gdo + r * pitch_v, 1, pitch_v);
    }
  }

  void scores(int64_t sample, int64_t head, int64_t first, int queries, int64_t key, int count) {
    const int width = round_up(count, kLanes<A>);
    const int diagonal = p.causal ? static_cast<int>(first - key) : kNoDiagonal;
    Product<A> product;
    product.pitch_b = product.pitch_c = pitch_s;
    product.rows = queries;
    product.columns = width;
    product.columns_to = diagonal;
    product.pitch_a = pitch_d;
    product.k = p.head_dim;
    multiply(product.to(s).term(q, kt));
    if (both) multiply(product.to(ds).term(dq, kt).term(q, dkt));  // without a term it clears the tile
    product.pitch_a = pitch_v;
    product.k = p.value_dim;
    multiply(product.to(y).term(go, vt).term(gdo, dvt));
    if (both) multiply(product.to(x).term(gdo, vt));
    const bool masked = p.mask.data != nullptr;
    for (int r = 0; r < queries; ++r) {
      A *row = s + r * pitch_s, *row_y = y + r * pitch_s;
      A *row_ds = both ? ds + r * pitch_s : nullptr, *row_x = both ? x + r * pitch_s : nullptr;
      const int seen = count <= r + diagonal ? count : r + diagonal + 1;
      if (masked && seen > 0) {
        for (int j = 0; j < seen; ++j) row[j] *= scale;
        mask_row(p.mask, sample, head, first + r, key, seen, row, row_ds);
      }
      const A factor = masked ? A(1) : scale;
      const int64_t i = first + r;
      if (both) {
        weigh_row<A, true>(row, row_y, row_ds, row_x, seen, width, factor, scale, lse[i], delta[i], mu[i], a[i]);
      } else {
        weigh_row<A, false>(row, row_y, nullptr, nullptr, seen, width, factor, scale, lse[i], delta[i], A(0), A(0));
      }
    }
  }

  void gradients(int64_t first, int queries, int64_t key, int count, int64_t into) {
    const bool hides = p.causal && key + count - 1 > first;
    const bool queries_exact = hides && !(all_finite(q, pitch_d, queries, p.head_dim) &&
                                          (!has_dq || all_finite(dq, pitch_d, queries, p.head_dim)) &&
                                          (!go || all_finite(go, pitch_v, queries, p.value_dim)) &&
                                          (!both || all_finite(gdo, pitch_v, queries, p.value_dim)));
    const bool keys_exact = hides && !(all_finite(k, pitch_d, count, p.head_dim) &&
                                       (!has_dk || all_finite(dk, pitch_d, count, p.head_dim)));
    const int diagonal = p.causal ? static_cast<int>(first - key) : kNoDiagonal;

    Product<A> product;  // of keys
    product.start = Start::add;
    product.across = true;
    product.pitch_a = pitch_s;
    product.rows = count;
    product.k = queries;
    product.k_from = diagonal;
    product.exact = queries_exact;
    product.pitch_b = product.pitch_c = pitch_v;
    product.columns = round_up(p.value_dim, kLanes<A>);
    if (gv) multiply(product.to(gv + into * pitch_v).term(s, go).term(ds, gdo));
    if (gdv) multiply(product.to(gdv + into * pitch_v).term(s, gdo));
    product.pitch_b = product.pitch_c = pitch_d;
    product.columns = round_up(p.head_dim, kLanes<A>);
    if (gk) multiply(product.to(gk + into * pitch_d).term(y, q).term(x, dq));
    if (gdk) multiply(product.to(gdk + into * pitch_d).term(x, q));

    product.across = false;  // of queries
    product.rows = queries;
    product.k = count;
    product.k_from = kNoDiagonal;
    product.k_to = diagonal;
    product.exact = keys_exact;
    product.pitch_c = pitch_gq;
    if (gq) multiply(product.to(gq + first * pitch_gq).term(y, k).term(x, dk));
    if (gdq) multiply(product.to(gdq + first * pitch_gq).term(x, k));
  }
};

template <class A> bool run(const AttentionBackward& p, const AttentionPlan& plan, int64_t first, int64_t last) {
  Backward<A> backward(p, plan);
  const ScratchMemory memory(backward.place(nullptr));
  if (!memory.base()) return false;
  backward.place(memory.base());
  for (int64_t unit = first; unit < last; ++unit) backward.unit(unit);
  return true;
}

// Adds the partial sums of one row (sample, head, query) of gQ and of gdQ.
template <class A> void sum_partials(const AttentionBackward& p, const AttentionPlan& plan, int64_t first, int64_t last) {
  const int pitch = plan.partial_pitch;
  const int64_t rows = p.batch * p.heads * p.queries;
  for (int64_t i = first; i < last; ++i) {
    const int64_t query = i % p.queries, head = i / p.queries % p.heads, sample = i / p.queries / p.heads;
    const Rows* const gradients[2] = {&p.gq, &p.gdq};
    for (int g = 0; g < 2; ++g) {
      if (!*gradients[g]) continue;
      A* sum = static_cast<A*>(plan.partial) + (g * plan.runs * rows + i) * pitch;
      for (int64_t run = 1; run < plan.runs; ++run) {
        const A* part = sum + run * rows * pitch;
        for (int c = 0; c < p.head_dim; ++c) sum[c] += part[c];
      }
      for (int c = 0; c < p.head_dim; ++c) sum[c] *= static_cast<A>(p.scale);
      store_row(*gradients[g], sample, head, query, sum, p.head_dim);
    }
  }
}

}  // namespace

bool attention_backward_units(const AttentionBackward& p, const AttentionPlan& plan, int64_t first, int64_t last) {
  return p.dtype == DType::f64 ? run<double>(p, plan, first, last) : run<float>(p, plan, first, last);
}

bool attention_backward_sums(const AttentionBackward& p, const AttentionPlan& plan, int64_t first, int64_t last) {
  if (p.dtype == DType::f64) sum_partials<double>(p, plan, first, last);
  else sum_partials<float>(p, plan, first, last);
  return true;
}

}  // namespace pyflowmap::PYFLOWMAP_ISA
