// error_norm_isa.cpp - the loops of `error_norm` on the CPU. Compiled once per instruction set into a namespace of its
// own (PYFLOWMAP_ISA = base, v3, v4); error_norm.cpp chooses one at run time. Contract: error_norm.h.
//
// A unit is walked in chunks that stay in the first-level cache: one loop makes the ratios, another adds their squares.
#include "error_norm/error_norm_isa.h"

#include <cmath>

#include "common/row_host.h"

#ifndef PYFLOWMAP_ISA
#define PYFLOWMAP_ISA base
#endif

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

constexpr int kChunk = 512;
constexpr int kMost = ErrorNorm::kMostTerms;

template <class A> struct Numbers { A c[kMost], rtol, atol; };

// NaN wins, as in torch.maximum.
template <class A> PFM_INLINE A larger(A a, A b) { return a > b || std::isnan(a) ? a : b; }

template <class A, int Terms>
void ratios(const ErrorNorm&, A* __restrict to, const A* const* k, const A* __restrict x, const A* __restrict y,
            const Numbers<A>& p, int n) {
  const A* __restrict k0 = k[0], * __restrict k1 = k[Terms > 1 ? 1 : 0], * __restrict k2 = k[Terms > 2 ? 2 : 0];
  const A* __restrict k3 = k[Terms > 3 ? 3 : 0], * __restrict k4 = k[Terms > 4 ? 4 : 0];
  const A* __restrict k5 = k[Terms > 5 ? 5 : 0], * __restrict k6 = k[Terms > 6 ? 6 : 0];
  for (int i = 0; i < n; ++i) {
    A e = p.c[0] * k0[i];
    if constexpr (Terms > 1) e += p.c[1] * k1[i];
    if constexpr (Terms > 2) e += p.c[2] * k2[i];
    if constexpr (Terms > 3) e += p.c[3] * k3[i];
    if constexpr (Terms > 4) e += p.c[4] * k4[i];
    if constexpr (Terms > 5) e += p.c[5] * k5[i];
    if constexpr (Terms > 6) e += p.c[6] * k6[i];
    to[i] = e / (p.atol + p.rtol * larger(std::fabs(x[i]), std::fabs(y[i])));
  }
}

template <class A> using Loop = void (*)(const ErrorNorm&, A*, const A* const*, const A*, const A*, const Numbers<A>&,
                                         int);

template <class A> Loop<A> loop_of(int terms) {
  static constexpr Loop<A> table[kMost] = {ratios<A, 1>, ratios<A, 2>, ratios<A, 3>, ratios<A, 4>,
                                           ratios<A, 5>, ratios<A, 6>, ratios<A, 7>};
  return table[terms - 1];
}

template <class A>
void run(const ErrorNorm& p, int64_t units_per_row, double* partials, int64_t first, int64_t last) {
  alignas(64) A space[kMost + 3][kChunk];
  const Loop<A> loop = loop_of<A>(p.terms);
  Numbers<A> numbers;
  numbers.rtol = static_cast<A>(p.rtol);
  numbers.atol = static_cast<A>(p.atol);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t row = unit / units_per_row;
    const double factor = p.factor ? p.factor[row] : 1.0;
    partials[unit] = 0.0;
    if (factor == 0.0) continue;
    for (int j = 0; j < p.terms; ++j) numbers.c[j] = static_cast<A>(p.c[j] * factor);
    const int64_t begin = (unit - row * units_per_row) * kErrorNormUnit;
    const int64_t end = begin + kErrorNormUnit < p.shape.columns ? begin + kErrorNormUnit : p.shape.columns;
    double sum = 0.0;
    for (int64_t column = begin; column < end; column += kChunk) {
      const int n = static_cast<int>(end - column < kChunk ? end - column : kChunk);
      const auto read = [&](const Rows& from, A* to) { return read_row(from, row * from.stride[2] + column, n, to); };
      const A* k[kMost] = {};
      for (int j = 0; j < p.terms; ++j) k[j] = read(p.k[j], space[j]);
      A* const ratio = space[kMost + 2];
      loop(p, ratio, k, read(p.x, space[kMost]), read(p.y, space[kMost + 1]), numbers, n);
      A of_chunk[1];
      row_sums<A, 1>(n, of_chunk, [=](Lanes<A>(&to)[1], const auto& load) PFM_INLINED {
        const Lanes<A> r = load(ratio, A(0));
        to[0] = to[0] + r * r;
      });
      sum += static_cast<double>(of_chunk[0]);
    }
    partials[unit] = sum;
  }
}

}  // namespace

void error_norm_units(const ErrorNorm& p, int64_t units_per_row, double* partials, int64_t first, int64_t last) {
  if (p.x.dtype == DType::f64) run<double>(p, units_per_row, partials, first, last);
  else run<float>(p, units_per_row, partials, first, last);
}

}  // namespace pyflowmap::PYFLOWMAP_ISA
