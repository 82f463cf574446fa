// attention_isa.cpp - the forward loops of attention on the CPU. Compiled once per instruction set into a namespace of
// its own (PYFLOWMAP_ISA = base, v3, v4); attention.cpp chooses one at run time. Contract: attention.h.
//
// A unit is a block of queries of one head. It walks blocks of keys: scores S and their tangent by two products, one
// fused pass to weights P and W under a running maximum, and two products onto the accumulators of O and dO, which are
// rescaled while they are loaded.
#include "attention/attention_isa.h"

#include "attention/attention_rows.h"
#include "attention/attention_scores.h"

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

template <class A> struct Forward {
  const AttentionForward& p;
  const AttentionPlan& plan;
  const bool has_dq, has_dk, has_dv, tangent, moves;  // moves: the scores have a tangent
  const A scale;
  int pitch_d, pitch_v, pitch_s;
  A *q, *dq, *rows, *kt, *dkt, *v, *dv, *s, *ds, *o, *t;
  Softmax<A> state;

  Forward(const AttentionForward& problem, const AttentionPlan& cut)
      : p(problem), plan(cut), has_dq(p.d_o && p.dq), has_dk(p.d_o && p.dk), has_dv(p.d_o && p.dv),
        tangent(static_cast<bool>(p.d_o)), moves(has_dq || has_dk), scale(static_cast<A>(p.scale)),
        pitch_d(pitch_of<A>(p.head_dim)), pitch_v(pitch_of<A>(p.value_dim)), pitch_s(pitch_of<A>(plan.key_block)) {}

  int64_t place(char* base) {
    Scratch scratch(base);
    const int queries = plan.query_block, keys = plan.key_block;
    q = scratch.tile<A>(queries, pitch_d);
    dq = scratch.tile<A>(queries, pitch_d, has_dq);
    rows = scratch.tile<A>(keys, pitch_d);
    kt = scratch.tile<A>(p.head_dim, pitch_s);
    dkt = scratch.tile<A>(p.head_dim, pitch_s, has_dk);
    v = scratch.tile<A>(keys, pitch_v);
    dv = scratch.tile<A>(keys, pitch_v, has_dv);
    s = scratch.tile<A>(queries, pitch_s);
    ds = scratch.tile<A>(queries, pitch_s, moves);
    o = scratch.tile<A>(queries, pitch_v);
    t = scratch.tile<A>(queries, pitch_v, tangent);
    state.maximum = scratch.take<A>(queries);
    state.alpha = scratch.take<A>(queries);
    state.sum = scratch.take<A>(int64_t{queries} * kLanes<A>);
    state.mu = scratch.take<A>(int64_t{queries} * kLanes<A>);
    return scratch.used();
  }

  void unit(int64_t index) {
    const int64_t head = index / plan.query_blocks % p.heads, sample = index / plan.query_blocks / p.heads;
    int64_t block = index % plan.query_blocks;
    // Later blocks of causal attention see more keys: alternate, so that runs of units are about equal.
    if (p.causal) block = block % 2 ? plan.query_blocks - 1 - block / 2 : block / 2;
    const int64_t first = block * plan.query_block;
    const int queries = static_cast<int>(p.queries - first < plan.query_block ? p.queries - first : plan.query_block);
    int64_t keys = keys_seen(p, sample);
    if (p.causal && keys > first + queries) keys = first + queries;

    pack(p.q, sample, head, first, queries, queries, p.head_dim, q, pitch_d);
    if (has_dq) pack(p.dq, sample, head, first, queries, queries, p.head_dim, dq, pitch_d);
    for (int r = 0; r < queries; ++r) {
      state.maximum[r] = kHidden<A>;
      memset(state.sum + r * kLanes<A>, 0, kVectorBytes);
      memset(state.mu + r * kLanes<A>, 0, kVectorBytes);
    }
    for (int64_t key = 0; key < keys; key += plan.key_block) {
      const int count = static_cast<int>(keys - key < plan.key_block ? keys - key : plan.key_block);
      keys_of(sample, head / (p.heads / p.kv_heads), key, count);
      scores(sample, head, first, queries, key, count);
      values(first, queries, key, count, key == 0);
    }
    finish(sample, head, first, queries, keys > 0);
  }

  void keys_of(int64_t sample, int64_t head, int64_t key, int count) {
    pack(p.k, sample, head, key, count, count, p.head_dim, rows, pitch_d);
    transpose(rows, pitch_d, count, p.head_dim, kt, pitch_s);
    if (has_dk) {
      pack(p.dk, sample, head, key, count, count, p.head_dim, rows, pitch_d);
      transpose(rows, pitch_d, count, p.head_dim, dkt, pitch_s);
    }
    pack(p.v, sample, head, key, count, count, p.value_dim, v, pitch_v);
    if (has_dv) pack(p.dv, sample, head, key, count, count, p.value_dim, dv, pitch_v);
  }

  // S and dS, then P and W in their place.
  void scores(int64_t sample, int64_t head, int64_t first, int queries, int64_t key, int count) {
    const int width = round_up(count, kLanes<A>);
    const int diagonal = p.causal ? static_cast<int>(first - key) : kNoDiagonal;
    Product<A> product;
    product.pitch_a = pitch_d;
    product.pitch_b = product.pitch_c = pitch_s;
    product.rows = queries;
    product.columns = width;
    product.k = p.head_dim;
    product.columns_to = diagonal;
    multiply(product.to(s).term(q, kt));
    if (moves) multiply(product.to(ds).term(dq, kt).term(q, dkt));
    const bool masked = p.mask.data != nullptr;
    for (int r = 0; r < queries; ++r) {
      A* row = s + r * pitch_s;
      A* row_tangent = moves ? ds + r * pitch_s : nullptr;
      const int seen = count <= r + diagonal ? count : r + diagonal + 1;
      if (masked && seen > 0) {
        for (int j = 0; j < seen; ++j) row[j] *= scale;
        mask_row(p.mask, sample, head, first + r, key, seen, row, row_tangent);
      }
      if (moves) soften_row<A, true>(row, row_tangent, seen, width, masked ? A(1) : scale, scale, state, r);
      else soften_row<A, false>(row, nullptr, seen, width, masked ? A(1) : scale, scale, state, r);
    }
  }

  // O and dO take up P V and W V + P dV.
  void values(int64_t first, int queries, int64_t key, int count, bool begins) {
    Product<A> product;
    product.pitch_a = pitch_s;
    product.pitch_b = product.pitch_c = pitch_v;
    product.rows = queries;
    product.columns = round_up(p.value_dim, kLanes<A>);
    product.k = count;
    product.start = begins ? Start::zero : Start::scale;
    product.alpha = state.alpha;
    if (p.causal) {
      product.k_to = static_cast<int>(first - key);
      product.exact = key + count - 1 > first && !(all_finite(v, pitch_v, count, p.value_dim) &&
                                                   (!has_dv || all_finite(dv, pitch_v, count, p.value_dim)));
    }
    multiply(product.to(o).term(s, v));
    if (tangent) multiply(product.to(t).term(ds, v).term(s, dv));
  }

  void finish(int64_t sample, int64_t head, int64_t first, int queries, bool any) {
    A* const lse = p.lse ? static_cast<A*>(p.lse) + (sample * p.heads + head) * p.queries + first : nullptr;
    A* const mu = p.mu ? static_cast<A*>(p.mu) + (sample * p.heads + head) * p.queries + first : nullptr;
    const int columns = round_up(p.value_dim, kLanes<A>);
    for (int r = 0; r < queries; ++r) {
      A *row = o + r * pitch_v, *row_tangent = tangent ? t + r * pitch_v : nullptr;
      const A sum = total(state.sum + r * kLanes<A>);
      if (!any || sum == A(0)) {  // a query that sees nothing, whatever its values were
        memset(row, 0, static_cast<size_t>(columns) * sizeof(A));
        if (tangent) memset(row_tangent, 0, static_cast<size_t>(columns) * sizeof(A));
        if (lse) lse[r] = kHidden<A>;
        if (mu) mu[r] = A(0);
      } else {
        const A mean = moves ? total(state.mu + r * kLanes<A>) / sum : A(0);
        const A inverse = A(1) / sum;
        for (int c = 0; c < columns; c += kLanes<A>) {
          const Vector<A> value = load(row + c) * inverse;
          put(row + c, value);
          if (tangent) put(row_tangent + c, load(row_tangent + c) * inverse - mean * value);
        }
        if (lse) lse[r] = state.maximum[r] + std::log(sum);
        if (mu) mu[r] = mean;
      }
      store_row(p.o, sample, head, first + r, row, p.value_dim);
      if (tangent) store_row(p.d_o, sample, head, first + r, row_tangent, p.value_dim);
    }
  }
};

template <class A> bool run(const AttentionForward& p, const AttentionPlan& plan, int64_t first, int64_t last) {
  Forward<A> forward(p, plan);
  const ScratchMemory memory(forward.place(nullptr));
  if (!memory.base()) return false;
  forward.place(memory.base());
  for (int64_t unit = first; unit < last; ++unit) forward.unit(unit);
  return true;
}

}  // namespace

bool attention_forward_units(const AttentionForward& p, const AttentionPlan& plan, int64_t first, int64_t last) {
  return p.dtype == DType::f64 ? run<double>(p, plan, first, last) : run<float>(p, plan, first, last);
}

}  // namespace pyflowmap::PYFLOWMAP_ISA
