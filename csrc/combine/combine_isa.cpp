// combine_isa.cpp - the loops of `combine` on the CPU. Compiled once per instruction set into a namespace of its own
// (PYFLOWMAP_ISA = base, v3, v4); combine.cpp chooses one at run time. Contract: combine.h.
//
// A unit is walked in chunks that stay in the first-level cache: operands are widened once per chunk, every output is
// one loop over the terms that are not zero, reductions read what is still in the cache. Lanes are explicit vectors of
// 16, so the order of a sum does not depend on the instruction set.
#include "combine/combine_isa.h"

#include "combine/combine_terms.h"
#include "combine/index_walker.h"
#include "common/normals.h"

#ifndef PYFLOWMAP_ISA
#define PYFLOWMAP_ISA base
#endif

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

constexpr int kChunk = 512;
constexpr int kSumLanes = 16;
constexpr int kShortRow = 32;  // rows of a policy or a 2-D toy: a whole run of 256 normals would be wasted

template <class A> struct Sum;
template <> struct Sum<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct Sum<double> { typedef double type __attribute__((vector_size(128))); };

template <class A> struct Scratch {
  alignas(64) A x[kMaxTerms][kChunk];
  alignas(64) A y[kMaxOutputs][kChunk];
  alignas(64) A mask[kChunk];
  alignas(64) float normal[kChunk + 2 * kNormalRun];
};

// ---- reading and writing chunks ---------------------------------------------------------------------------------

template <class A, class T> PFM_INLINE void widen(A* __restrict to, const void* from, int64_t at, int n) {
  const T* source = static_cast<const T*>(from) + at;
  for (int i = 0; i < n; ++i) to[i] = to_float(source[i]);
}

template <class A, class T> PFM_INLINE void narrow_to(void* to, int64_t at, const A* __restrict from, int n) {
  T* target = static_cast<T*>(to) + at;
  for (int i = 0; i < n; ++i) store(target + i, from[i]);
}

// A pointer to n elements of an operand as A: into the operand itself, or into `space` after widening.
PFM_INLINE const float* read(const Operand& x, int64_t at, int n, float* space) {
  if (x.dtype == DType::f32) return static_cast<const float*>(x.data) + at;
  if (x.dtype == DType::bf16) widen<float, bf16>(space, x.data, at, n);
  else widen<float, f16>(space, x.data, at, n);
  return space;
}
PFM_INLINE const double* read(const Operand& x, int64_t at, int, double*) {
  return static_cast<const double*>(x.data) + at;
}

PFM_INLINE void write(const Operand& y, int64_t at, const float* from, int n) {
  if (y.dtype == DType::f32) narrow_to<float, float>(y.data, at, from, n);
  else if (y.dtype == DType::bf16) narrow_to<float, bf16>(y.data, at, from, n);
  else narrow_to<float, f16>(y.data, at, from, n);
}
PFM_INLINE void write(const Operand& y, int64_t at, const double* from, int n) {
  narrow_to<double, double>(y.data, at, from, n);
}

PFM_INLINE bool stored_as(const Operand& y, float) { return y.dtype == DType::f32; }
PFM_INLINE bool stored_as(const Operand&, double) { return true; }

template <class A> PFM_INLINE const A* read_mask(const Mask& mask, int64_t row, int64_t position, int n, A* space) {
  const A* data = static_cast<const A*>(mask.data) + row * mask.row_stride;
  if (mask.index.dims == 0) return data + position;
  // Run by run along the innermost dimension: a mask is dense there, or constant (broadcast over channels_last channels).
  const int inner = mask.index.dims - 1;
  const int64_t size = mask.index.size[inner], stride = mask.index.stride[inner];
  for (int i = 0; i < n;) {
    const IndexWalker walker = IndexWalker::at(mask.index, position + i);
    const int64_t left = size - walker.digit[inner];
    const int run = static_cast<int>(left < n - i ? left : n - i);
    const A* from = data + walker.index;
    if (stride == 1) memcpy(space + i, from, static_cast<size_t>(run) * sizeof(A));
    else
      for (int k = 0; k < run; ++k) space[i + k] = from[k * stride];
    i += run;
  }
  return space;
}

PFM_INLINE float* as_float(float* x) { return x; }
PFM_INLINE float* as_float(double*) { return nullptr; }

template <class A>
PFM_INLINE void draw(const CombineParams& p, int64_t row, int64_t position, int n, A* to, float* normal) {
  const Noise& noise = p.noise;
  const int64_t group = row / noise.rows_per_sample;
  const uint64_t sample = static_cast<uint64_t>(noise.sample_ids ? noise.sample_ids[group] : group);
  const uint64_t seed = noise.seed + (noise.seed_data ? static_cast<uint64_t>(*noise.seed_data) : 0u);
  const uint32_t stream = noise.stream + (noise.stream_data ? static_cast<uint32_t>(*noise.stream_data) : 0u);
  const int64_t base = (row % noise.rows_per_sample) * p.columns;
  if (noise.logical.dims == 0) {
    const int64_t element = base + position;
    const int skip = static_cast<int>(element & 3);
    if (n <= kShortRow) {
      for (int i = -skip; i < n; i += 4) {
        float four[4];
        normals_of_block(seed, sample, stream, static_cast<uint32_t>((element + i) >> 2), four);
        for (int k = i < 0 ? -i : 0; k < 4 && i + k < n; ++k) to[i + k] = static_cast<A>(four[k]);
      }
      return;
    }
    if (as_float(to) && skip == 0 && n % kNormalRun == 0) {  // the usual chunk: nothing to move or convert
      for (int i = 0; i < n; i += kNormalRun) {
        normal_run(seed, sample, stream, static_cast<uint32_t>((element + i) >> 2), as_float(to) + i);
      }
      return;
    }
    for (int i = 0; i < n + skip; i += kNormalRun) {
      normal_run(seed, sample, stream, static_cast<uint32_t>((element + i) >> 2), normal + i);
    }
    for (int i = 0; i < n; ++i) to[i] = static_cast<A>(normal[skip + i]);
    return;
  }
  IndexWalker walker = IndexWalker::at(noise.logical, position);
  for (int i = 0; i < n; ++i, walker.advance()) {
    const int64_t element = base + walker.index;
    float four[4];
    normals_of_block(seed, sample, stream, static_cast<uint32_t>(element >> 2), four);
    to[i] = static_cast<A>(four[element & 3]);
  }
}

// ---- reductions ---------------------------------------------------------------------------------------------------

template <class A> PFM_INLINE double fold(const typename Sum<A>::type& lanes) {
  A lane[kSumLanes];
  memcpy(lane, &lanes, sizeof lane);
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return static_cast<double>(lane[0]);
}

template <class A> PFM_INLINE double dot(const A* x, const A* y, int n) {
  using V = typename Sum<A>::type;
  V sum = {}, v, w;
  int i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    memcpy(&v, x + i, sizeof v);
    memcpy(&w, y + i, sizeof w);
    sum += v * w;
  }
  for (int lane = 0; i < n; ++i, ++lane) sum[lane] += x[i] * y[i];
  return fold<A>(sum);
}

template <class A> PFM_INLINE double total(const A* x, int n) {
  using V = typename Sum<A>::type;
  V sum = {}, v;
  int i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    memcpy(&v, x + i, sizeof v);
    sum += v;
  }
  for (int lane = 0; i < n; ++i, ++lane) sum[lane] += x[i];
  return fold<A>(sum);
}

// Adds the inner products of one chunk to the unit's numbers.
template <class A> PFM_INLINE void reduce(const CombineParams& p, const A* const* x, const A* const* y, int n,
                                          double* sum) {
  if (p.gram) {
    for (int k = 0; k < p.outputs; ++k) {
      for (int l = k; l < p.outputs; ++l) *sum++ += dot(y[k], y[l], n);
    }
  }
  if (p.cross) {
    for (int k = 0; k < p.outputs; ++k) {
      for (int j = 0; j < p.inputs; ++j) *sum++ += dot(y[k], x[j], n);
      if (p.noise.present) *sum++ += dot(y[k], x[kMaxInputs], n);
    }
  }
  if (p.sums) {
    for (int k = 0; k < p.outputs; ++k) *sum++ += total(y[k], n);
  }
}

// ---- a run of units -----------------------------------------------------------------------------------------------

PFM_INLINE double factor(const Coefficient& c, int64_t row) {
  if (!c.vector) return 1.0;
  return c.vector_is_double ? static_cast<const double*>(c.vector)[row * c.stride]
                            : static_cast<double>(static_cast<const float*>(c.vector)[row * c.stride]);
}

template <class A> struct RowTerms {
  int count[kMaxOutputs];
  int term[kMaxOutputs][kMaxTerms];  // index into x; kMaxInputs is the noise
  A a[kMaxOutputs][kMaxTerms], b[kMaxOutputs][kMaxTerms];
  bool needed[kMaxTerms];
  int pair = 0;  // terms of the first two outputs together, where one loop can do both; else 0
  int pair_term[kMaxTerms];
  A pair_a[2][kMaxTerms];
};

constexpr int kMaxPair = 6;  // more terms than registers hold are faster one output at a time

// Whether one loop can do the first two outputs: plain stores, and terms in both.
template <class A> PFM_INLINE void form_pair(const CombineParams& p, const CombinePlan& plan, RowTerms<A>& terms) {
  terms.pair = 0;
  if (p.outputs < 2 || p.mask.data || terms.count[0] == 0 || terms.count[1] == 0) return;
  for (int k = 0; k < 2; ++k) {
    if (!p.y[k].data || !stored_as(p.y[k], A(0)) || plan.stage[k] || p.clamp[k]) return;
  }
  int count = 0;
  for (int j = 0; j < kMaxTerms; ++j) {
    A a[2] = {A(0), A(0)};
    for (int k = 0; k < 2; ++k) {
      for (int t = 0; t < terms.count[k]; ++t) {
        if (terms.term[k][t] == j) a[k] = terms.a[k][t];
      }
    }
    if (a[0] == A(0) && a[1] == A(0)) continue;
    terms.pair_term[count] = j;
    terms.pair_a[0][count] = a[0];
    terms.pair_a[1][count] = a[1];
    ++count;
  }
  if (count >= 2 && count <= kMaxPair) terms.pair = count;
}

template <class A> PFM_INLINE void form_terms(const CombineParams& p, int64_t row, RowTerms<A>& terms) {
  for (int j = 0; j <= kMaxInputs; ++j)
    terms.needed[j] = p.cross && (j < p.inputs || (j == kMaxInputs && p.noise.present));
  for (int k = 0; k < p.outputs; ++k) {
    int count = 0;
    for (int j = 0; j <= kMaxInputs; ++j) {
      if (j == kMaxInputs ? !p.noise.present : j >= p.inputs) continue;
      const Coefficient &ca = p.a[k][j], &cb = p.b[k][j];
      const A a = ca.scalar == 0.0 ? A(0) : static_cast<A>(ca.scalar * factor(ca, row));
      const A b = !p.mask.data || cb.scalar == 0.0 ? A(0) : static_cast<A>(cb.scalar * factor(cb, row));
      if (a == A(0) && b == A(0)) continue;
      terms.term[k][count] = j;
      terms.a[k][count] = a;
      terms.b[k][count] = b;
      terms.needed[j] = true;
      ++count;
    }
    terms.count[k] = count;
  }
}

template <class A>
void combine_unit(const CombineParams& p, const CombinePlan& plan, const RowTerms<A>& terms, int64_t row, int64_t begin,
                  int64_t end, double* partial, Scratch<A>& scratch) {
  // Where nothing passes through scratch there is no reason to stop after a chunk.
  const int64_t step = plan.direct && (p.outputs == 1 || terms.pair > 0) ? end - begin : kChunk;
  for (int64_t position = begin; position < end; position += step) {
    const int n = static_cast<int>(end - position < step ? end - position : step);
    const A* x[kMaxTerms] = {};
    for (int j = 0; j < p.inputs; ++j) {
      if (terms.needed[j]) x[j] = read(p.x[j], row * p.x[j].row_stride + position, n, scratch.x[j]);
    }
    if (terms.needed[kMaxInputs]) {
      draw(p, row, position, n, scratch.x[kMaxInputs], scratch.normal);
      x[kMaxInputs] = scratch.x[kMaxInputs];
    }
    const A* mask = p.mask.data ? read_mask(p.mask, row, position, n, scratch.mask) : nullptr;

    const A* y[kMaxOutputs];
    if (terms.pair > 0) {
      const A* term[kMaxTerms];
      for (int t = 0; t < terms.pair; ++t) term[t] = x[terms.pair_term[t]];
      A* to[2];
      for (int k = 0; k < 2; ++k) to[k] = static_cast<A*>(p.y[k].data) + row * p.y[k].row_stride + position;
      if (plan.stream[0] && plan.stream[1]) {
        combine_pair<A, true>(to[0], to[1], term, terms.pair_a[0], terms.pair_a[1], terms.pair, n);
      } else {
        combine_pair<A, false>(to[0], to[1], term, terms.pair_a[0], terms.pair_a[1], terms.pair, n);
      }
      y[0] = to[0];
      y[1] = to[1];
    }
    for (int k = terms.pair > 0 ? 2 : 0; k < p.outputs; ++k) {
      const Operand& out = p.y[k];
      const bool selects = !out.data && !mask && !p.clamp[k] && terms.count[k] == 1 && terms.a[k][0] == A(1);
      if (selects) {  // an input that only enters the inner products: nothing to copy
        y[k] = x[terms.term[k][0]];
        continue;
      }
      const int64_t at = row * out.row_stride + position;
      const bool direct = out.data && stored_as(out, A(0)) && !plan.stage[k] && !p.clamp[k] && !mask;
      A* to = direct ? static_cast<A*>(out.data) + at : scratch.y[k];
      const A* term[kMaxTerms];
      for (int t = 0; t < terms.count[k]; ++t) term[t] = x[terms.term[k][t]];
      if (mask) combine_masked(to, term, terms.a[k], terms.b[k], mask, terms.count[k], n);
      else if (direct && plan.stream[k]) combine_chunk<A, true>(to, term, terms.a[k], terms.count[k], n);
      else combine_chunk<A, false>(to, term, terms.a[k], terms.count[k], n);
      if (p.clamp[k]) {
        const A low = static_cast<A>(p.low[k]), high = static_cast<A>(p.high[k]);
        for (int i = 0; i < n; ++i) to[i] = to[i] < low ? low : to[i] > high ? high : to[i];
      }
      y[k] = to;
      if (out.data && !direct && !plan.stage[k]) write(out, at, to, n);
    }
    if (partial) reduce(p, x, y, n, partial);
    for (int k = 0; k < p.outputs; ++k) {
      if (p.y[k].data && plan.stage[k]) write(p.y[k], row * p.y[k].row_stride + position, y[k], n);
    }
  }
}

template <class A>
void run(const CombineParams& p, const CombinePlan& plan, int64_t first_unit, int64_t last_unit) {
  Scratch<A> scratch;
  RowTerms<A> terms;
  int64_t formed = -1;
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t row = unit / plan.units_per_row;
    const int64_t begin = (unit % plan.units_per_row) * plan.columns_per_unit;
    const int64_t end = begin + plan.columns_per_unit < p.columns ? begin + plan.columns_per_unit : p.columns;
    if (row != formed) {
      form_terms(p, row, terms);
      form_pair(p, plan, terms);
    }
    formed = row;
    combine_unit(p, plan, terms, row, begin, end, plan.partials ? plan.partials + unit * plan.reductions : nullptr,
                 scratch);
  }
}

}  // namespace

void combine_units(const CombineParams& p, const CombinePlan& plan, int64_t first_unit, int64_t last_unit) {
  bool wide = false;
  for (int j = 0; j < p.inputs; ++j) wide |= p.x[j].dtype == DType::f64;
  for (int k = 0; k < p.outputs; ++k) wide |= p.y[k].dtype == DType::f64;
  if (wide) run<double>(p, plan, first_unit, last_unit);
  else run<float>(p, plan, first_unit, last_unit);
#if defined(__SSE2__)
  for (int k = 0; k < p.outputs; ++k) {
    if (plan.stream[k]) {
      _mm_sfence();
      break;
    }
  }
#endif
}

}  // namespace pyflowmap::PYFLOWMAP_ISA
