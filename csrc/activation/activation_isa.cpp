// activation_isa.cpp - the loops of `activation` on the CPU. Compiled once per instruction set into a namespace of its
// own (PYFLOWMAP_ISA = base, v3, v4); activation.cpp chooses one at run time. Contract: activation.h.
//
// A unit is walked in chunks that stay in the first-level cache. What is stored as the arithmetic type is read and
// written where it lies; other types are widened and narrowed a chunk at a time. A missing operand is a chunk of zeros
// and an unwanted result goes to a chunk that nobody reads: four loops per function and no branch inside them.
#include "activation/activation_isa.h"

#include "activation/activation_math.h"

#ifndef PYFLOWMAP_ISA
#define PYFLOWMAP_ISA base
#endif

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

constexpr int kChunk = 512;
constexpr int kInputs = 6, kOutputs = 4;

template <class A> struct Chunk {
  const A* in[kInputs];  // a, b, da, db, gy, gdy
  A* out[kOutputs];      // y, dy; or ga, gb, gda, gdb
};

template <class A> using Loop = void (*)(const Chunk<A>&, int n);

// ---- the loops ------------------------------------------------------------------------------------------------------

enum Mode { kValue, kPair, kPrimal, kBoth };

template <ActivationKind kind, bool gated, Mode mode, class A> void loop(const Chunk<A>& c, int n) {
  const A* __restrict a = c.in[0], * __restrict b = c.in[1], * __restrict da = c.in[2], * __restrict db = c.in[3];
  const A* __restrict gy = c.in[4], * __restrict gdy = c.in[5];
  A* __restrict r0 = c.out[0], * __restrict r1 = c.out[1], * __restrict r2 = c.out[2], * __restrict r3 = c.out[3];
  constexpr bool cuts = kind == ActivationKind::relu, moves = mode == kPair || mode == kBoth;
  for (int i = 0; i < n; ++i) {
    Element<A> x = {a[i], A(0), A(0), A(0), A(0), A(0)};
    if constexpr (gated) x.b = b[i];
    if constexpr (moves) x.da = da[i];
    if constexpr (moves && gated) x.db = db[i];
    if constexpr (mode == kPrimal || mode == kBoth) x.gy = gy[i];
    if constexpr (mode == kBoth) x.gdy = gdy[i];
    const Jet<A> j = jet<kind>(x.a);
    if constexpr (mode == kValue || mode == kPair) {
      const Results<A> r = forward_of<gated>(j, x, cuts);
      r0[i] = r.v[0];
      if constexpr (moves) r1[i] = r.v[1];
    } else {
      const Results<A> r = backward_of<gated, mode == kBoth>(j, x, cuts);
      r0[i] = r.v[0];
      if constexpr (gated) r1[i] = r.v[1];
      if constexpr (moves) r2[i] = r.v[2];
      if constexpr (moves && gated) r3[i] = r.v[3];
    }
  }
}

template <ActivationKind kind, class A> Loop<A> loop_of(bool gated, Mode mode) {
  static constexpr Loop<A> table[2][4] = {{loop<kind, false, kValue, A>, loop<kind, false, kPair, A>,
                                           loop<kind, false, kPrimal, A>, loop<kind, false, kBoth, A>},
                                          {loop<kind, true, kValue, A>, loop<kind, true, kPair, A>,
                                           loop<kind, true, kPrimal, A>, loop<kind, true, kBoth, A>}};
  return table[gated][mode];
}

template <class A> Loop<A> loop_of(const Activation& p) {
  const Mode mode = p.backward ? (p.gdy ? kBoth : kPrimal) : p.dy ? kPair : kValue;
  const bool gated = static_cast<bool>(p.b);
  switch (p.kind) {
    case ActivationKind::silu: return loop_of<ActivationKind::silu, A>(gated, mode);
    case ActivationKind::gelu: return loop_of<ActivationKind::gelu, A>(gated, mode);
    case ActivationKind::gelu_tanh: return loop_of<ActivationKind::gelu_tanh, A>(gated, mode);
    case ActivationKind::relu: return loop_of<ActivationKind::relu, A>(gated, mode);
    case ActivationKind::sigmoid: return loop_of<ActivationKind::sigmoid, A>(gated, mode);
    default: return loop_of<ActivationKind::tanh, A>(gated, mode);
  }
}

// ---- storage --------------------------------------------------------------------------------------------------------

template <class T> void widen(float* __restrict to, const T* __restrict from, int n) {
  for (int i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
template <class T> void narrow(T* __restrict to, const float* __restrict from, int n) {
  for (int i = 0; i < n; ++i) store(to + i, from[i]);
}

template <class A> bool is_direct(const Rows& x) { return x.dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32); }

struct Place { int64_t i, j, k, column; };

template <class T> T* at(const Rows& x, const Place& place) {
  return row<T>(x, place.i, place.j, place.k) + place.column;
}

const float* read(const Rows& x, const Place& place, int n, float* space) {
  if (x.dtype == DType::bf16) widen(space, at<bf16>(x, place), n);
  else widen(space, at<f16>(x, place), n);
  return space;
}
const double* read(const Rows&, const Place&, int, double* space) { return space; }

void write(const Rows& x, const Place& place, int n, const float* from) {
  if (x.dtype == DType::bf16) narrow(at<bf16>(x, place), from, n);
  else narrow(at<f16>(x, place), from, n);
}
void write(const Rows&, const Place&, int, const double*) {}

template <class A> void run(const Activation& p, int64_t units_per_row, int64_t first, int64_t last) {
  alignas(64) A space[kInputs + kOutputs][kChunk];
  alignas(64) static constexpr A zeros[kChunk] = {};
  const Rows* in[kInputs] = {&p.a, &p.b, &p.da, &p.db, &p.gy, &p.gdy};
  const Rows* out[kOutputs] = {&p.y, &p.dy, nullptr, nullptr};
  if (p.backward) {
    const Rows* gradients[kOutputs] = {&p.ga, &p.gb, &p.gda, &p.gdb};
    for (int r = 0; r < kOutputs; ++r) out[r] = gradients[r];
  }
  const Loop<A> loop = loop_of<A>(p);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t line = unit / units_per_row, part = unit - line * units_per_row;
    const int64_t pair = line / p.shape.outer[2];
    Place place = {pair / p.shape.outer[1], pair % p.shape.outer[1], line % p.shape.outer[2], part * kActivationUnit};
    const int64_t end =
        place.column + kActivationUnit < p.shape.columns ? place.column + kActivationUnit : p.shape.columns;
    for (; place.column < end; place.column += kChunk) {
      const int n = static_cast<int>(end - place.column < kChunk ? end - place.column : kChunk);
      Chunk<A> c;
      for (int s = 0; s < kInputs; ++s) {
        const Rows& x = *in[s];
        c.in[s] = !x ? zeros : is_direct<A>(x) ? at<A>(x, place) : read(x, place, n, space[s]);
      }
      for (int r = 0; r < kOutputs; ++r)
        c.out[r] = out[r] && *out[r] && is_direct<A>(*out[r]) ? at<A>(*out[r], place) : space[kInputs + r];
      loop(c, n);
      for (int r = 0; r < kOutputs; ++r) {
        if (out[r] && *out[r] && !is_direct<A>(*out[r])) write(*out[r], place, n, c.out[r]);
      }
    }
  }
}

}  // namespace

void activation_units(const Activation& p, int64_t units_per_row, int64_t first, int64_t last) {
  if (p.a.dtype == DType::f64) run<double>(p, units_per_row, first, last);
  else run<float>(p, units_per_row, first, last);
}

}  // namespace pyflowmap::PYFLOWMAP_ISA
