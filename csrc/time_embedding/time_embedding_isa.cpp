// time_embedding_isa.cpp - the loops of `time_embedding` on the CPU. Compiled once per instruction set into a namespace of
// its own (PYFLOWMAP_ISA = base, v3, v4); time_embedding.cpp chooses one at run time. Contract: time_embedding.h.
#include "time_embedding/time_embedding_isa.h"

#include <cmath>

#include "common/row_host.h"

#ifndef PYFLOWMAP_ISA
#define PYFLOWMAP_ISA base
#endif

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

// ---- cosine and sine ----------------------------------------------------------------------------------------------------

constexpr float kFar = 1048576.0f;  // 2^20: from here on k * kHigh below would round

// Of w[i] * time in float. The remainder of pi / 2 is formed in double: k * kHigh is exact, kHigh + kLow is pi / 2 to 77
// bits, so even next to a multiple of pi / 2 the remainder has more digits than a float. The series end below 1e-11.
void cos_sin(float* __restrict c, float* __restrict s, const float* __restrict w, float time, int64_t n) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, kept in the low bits
  constexpr double kTwoOverPi = 0.63661977236758134308, kHigh = 1.57079637050628662109375,
                   kLow = -4.37113900018624283e-8;
  for (int64_t i = 0; i < n; ++i) {
    const float angle = w[i] * time;
    const double x = static_cast<double>(angle), rounded = x * kTwoOverPi + kRound, k = rounded - kRound;
    const double r = (x - k * kHigh) - k * kLow, z = r * r;
    const double odd =
        r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 - z * (1.0 / 39916800)))));
    const double even =
        1.0 + z * (-0.5 + z * (1.0 / 24 +
                               z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
    int64_t quarter;
    memcpy(&quarter, &rounded, sizeof quarter);
    const double cosine = quarter & 1 ? odd : even, sine = quarter & 1 ? even : odd;
    c[i] = static_cast<float>((quarter + 1) & 2 ? -cosine : cosine);
    s[i] = static_cast<float>(quarter & 2 ? -sine : sine);
  }
  for (int64_t i = 0; i < n; ++i) {
    const float angle = w[i] * time;
    if (std::fabs(angle) < kFar) continue;  // false for NaN
    c[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
    s[i] = static_cast<float>(std::sin(static_cast<double>(angle)));
  }
}

void cos_sin(double* c, double* s, const double* w, double time, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    c[i] = std::cos(w[i] * time);
    s[i] = std::sin(w[i] * time);
  }
}

// ---- the two times of a sample --------------------------------------------------------------------------------------------

template <class A> PFM_INLINE A read_one(const Rows& x, int64_t i) {
  A space = A(0);
  return x ? *read_row(x, i * x.stride[0], 1, &space) : A(0);
}

template <class A> struct Times { A of[2]; };

template <class A> PFM_INLINE Times<A> times(const Rows& s, const Rows& t, bool span, int64_t i) {
  const A first = read_one<A>(s, i), second = read_one<A>(t, i);
  return {{first, span ? second - first : second}};
}

template <class A> PFM_INLINE void write_one(const Rows& y, int64_t i, A value) {
  A space = A(0);
  if (!y) return;
  A* to = target_row(y, i * y.stride[0], &space);
  *to = value;
  write_row(y, i * y.stride[0], 1, to);
}

template <class A> PFM_INLINE void write_times(const Rows& s, const Rows& t, bool span, int64_t i, const A (&g)[2]) {
  write_one(s, i, span ? g[0] - g[1] : g[0]);
  write_one(t, i, g[1]);
}

// ---- samples --------------------------------------------------------------------------------------------------------------

template <class A> void forward_of_type(const TimeEmbeddingForward& p, int64_t first, int64_t last, void* memory) {
  const int64_t h = p.frequencies;
  const A* w = static_cast<const A*>(p.w.data);
  A* const space = static_cast<A*>(memory);
  A *c_space = space, *s_space = space + h, *dc_space = space + 2 * h, *ds_space = space + 3 * h;
  for (int64_t b = first; b < last; ++b) {
    const Times<A> time = times<A>(p.s, p.t, p.span, b), d_time = times<A>(p.ds, p.dt, p.span, b);
    for (int which = 0; which < 2; ++which) {
      const int64_t at = b * p.y.stride[0] + 2 * which * h, d_at = b * p.dy.stride[0] + 2 * which * h;
      A *c = target_row(p.y, at, c_space), *s = target_row(p.y, at + h, s_space);
      cos_sin(c, s, w, time.of[which], h);
      if (p.dy) {
        A *dc = target_row(p.dy, d_at, dc_space), *ds = target_row(p.dy, d_at + h, ds_space);
        for (int64_t i = 0; i < h; ++i) {
          const A speed = w[i] * d_time.of[which];
          dc[i] = -s[i] * speed;
          ds[i] = c[i] * speed;
        }
        write_row(p.dy, d_at, h, dc);
        write_row(p.dy, d_at + h, h, ds);
      }
      write_row(p.y, at, h, c);
      write_row(p.y, at + h, h, s);
    }
  }
}

template <class A> void backward_of_type(const TimeEmbeddingBackward& p, int64_t first, int64_t last, void* memory) {
  const int64_t h = p.frequencies;
  const A* w = static_cast<const A*>(p.w.data);
  A* next = static_cast<A*>(memory);
  const auto take = [&] {
    A* const row = next;
    next += h;
    return row;
  };
  A *c = take(), *s = take(), *zero = take();
  A *g1_space = take(), *g2_space = take(), *d1_space = take(), *d2_space = take();
  for (int64_t i = 0; i < h; ++i) zero[i] = A(0);
  const auto read = [&](const Rows& g, int64_t b, int64_t column, A* space) -> const A* {
    return g ? read_row(g, b * g.stride[0] + column, h, space) : zero;
  };
  for (int64_t b = first; b < last; ++b) {
    const Times<A> time = times<A>(p.s, p.t, p.span, b), d_time = times<A>(p.ds, p.dt, p.span, b);
    A g[2], gd[2];
    for (int which = 0; which < 2; ++which) {
      const int64_t column = 2 * which * h;
      cos_sin(c, s, w, time.of[which], h);
      const A *g1 = read(p.gy, b, column, g1_space), *g2 = read(p.gy, b, column + h, g2_space);
      const A *d1 = read(p.gdy, b, column, d1_space), *d2 = read(p.gdy, b, column + h, d2_space);
      A sums[3];
      row_sums<A, 3>(h, sums, [=](Lanes<A>(&to)[3], const auto& load) PFM_INLINED {
        const Lanes<A> wi = load(w, A(0)), ci = load(c, A(0)), si = load(s, A(0));
        const Lanes<A> x1 = load(g1, A(0)), x2 = load(g2, A(0)), z1 = load(d1, A(0)), z2 = load(d2, A(0));
        to[0] = to[0] + wi * (x2 * ci - x1 * si);
        to[1] = to[1] + wi * (z2 * ci - z1 * si);
        to[2] = to[2] + wi * wi * (z1 * ci + z2 * si);
      });
      g[which] = sums[0] - d_time.of[which] * sums[2];
      gd[which] = sums[1];
    }
    write_times(p.gs, p.gt, p.span, b, g);
    write_times(p.gds, p.gdt, p.span, b, gd);
  }
}

void forward(const TimeEmbeddingForward& p, int64_t first, int64_t last, void* space) {
  if (p.s.dtype == DType::f64) forward_of_type<double>(p, first, last, space);
  else forward_of_type<float>(p, first, last, space);
}

void backward(const TimeEmbeddingBackward& p, int64_t first, int64_t last, void* space) {
  if (p.s.dtype == DType::f64) backward_of_type<double>(p, first, last, space);
  else backward_of_type<float>(p, first, last, space);
}

}  // namespace

const TimeEmbeddingLoops time_embedding_loops = {forward, backward};

}  // namespace pyflowmap::PYFLOWMAP_ISA
