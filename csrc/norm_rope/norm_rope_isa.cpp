// norm_rope_isa.cpp - the loops of `norm_rope` on the CPU. Compiled once per instruction set into a namespace of its own
// (PYFLOWMAP_ISA = base, v3, v4); norm_rope.cpp chooses one at run time. Contract: norm_rope.h.
//
// A row, which the first-level cache holds, is walked twice: for its sums, then for its result. What is not given is read
// as a row of zeros from that cache. The rotation is a walk of its own, from scratch to result.
#include "norm_rope/norm_rope_isa.h"

#include <cmath>

#include "common/row_host.h"

#ifndef PYFLOWMAP_ISA
#define PYFLOWMAP_ISA base
#endif

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

// ---- rotation ---------------------------------------------------------------------------------------------------------

template <class A> struct Angles { const A *cos, *sin; };  // null: no rotation

template <class A>
PFM_INLINE void turn(A* __restrict to, const A* __restrict from, const A* __restrict c, const A* __restrict s,
                     int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    to[i] = c[i] * from[i] - s[i] * from[i + half];
    to[i + half] = c[i] * from[i + half] + s[i] * from[i];
  }
}

template <class A>
PFM_INLINE void turn_back(A* __restrict to, const A* __restrict from, const A* __restrict c, const A* __restrict s,
                          int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    to[i] = c[i] * from[i] + s[i] * from[i + half];
    to[i + half] = c[i] * from[i + half] - s[i] * from[i];
  }
}

// ---- one row ----------------------------------------------------------------------------------------------------------

template <class A> PFM_INLINE A reciprocal_root(A sum, int64_t n, A eps) {
  return A(1) / std::sqrt(sum / static_cast<A>(n) + eps);
}

template <class A>
PFM_INLINE void scale(A* __restrict a, const A* __restrict x, const A* __restrict w, int64_t n, A eps) {
  A sum[1];
  row_sums<A, 1>(n, sum, [=](Lanes<A>(&to)[1], const auto& load) PFM_INLINED {
    const Lanes<A> v = load(x, A(0));
    to[0] = to[0] + v * v;
  });
  const A r = reciprocal_root(sum[0], n, eps);
  for (int64_t i = 0; i < n; ++i) a[i] = w[i] * (r * x[i]);
}

template <class A>
PFM_INLINE void scale_pair(A* __restrict a, A* __restrict da, const A* __restrict x, const A* __restrict dx,
                           const A* __restrict w, const A* __restrict dw, int64_t n, A eps) {
  A sum[2];
  row_sums<A, 2>(n, sum, [=](Lanes<A>(&to)[2], const auto& load) PFM_INLINED {
    const Lanes<A> v = load(x, A(0));
    const Lanes<A> d = load(dx, A(0));
    to[0] = to[0] + v * v;
    to[1] = to[1] + v * d;
  });
  const A r = reciprocal_root(sum[0], n, eps), u = r * (r * (sum[1] / static_cast<A>(n)));
  for (int64_t i = 0; i < n; ++i) {
    const A m = r * x[i];
    a[i] = w[i] * m;
    da[i] = dw[i] * m + w[i] * (r * dx[i] - u * m);
  }
}

template <class A>
PFM_INLINE void back(A* __restrict gx, A* __restrict gw, const A* __restrict x, const A* __restrict z,
                     const A* __restrict w, int64_t n, A eps) {
  A sum[2];
  row_sums<A, 2>(n, sum, [=](Lanes<A>(&to)[2], const auto& load) PFM_INLINED {
    const Lanes<A> v = load(x, A(0));
    const Lanes<A> f = load(z, A(0));
    const Lanes<A> c = load(w, A(0));
    to[0] = to[0] + v * v;
    to[1] = to[1] + v * (c * f);
  });
  const A r = reciprocal_root(sum[0], n, eps), mean = r * (sum[1] / static_cast<A>(n));
  for (int64_t i = 0; i < n; ++i) {
    const A m = r * x[i];
    gx[i] = r * (w[i] * z[i] - mean * m);
    gw[i] += z[i] * m;
  }
}

template <class A>
PFM_INLINE void back_pair(A* __restrict gx, A* __restrict gdx, A* __restrict gw, A* __restrict gdw,
                          const A* __restrict x, const A* __restrict dx, const A* __restrict w, const A* __restrict dw,
                          const A* __restrict z, const A* __restrict zd, int64_t n, A eps) {
  A sum[5];
  row_sums<A, 5>(n, sum, [=](Lanes<A>(&to)[5], const auto& load) PFM_INLINED {
    const Lanes<A> v = load(x, A(0));
    const Lanes<A> d = load(dx, A(0));
    const Lanes<A> c = load(w, A(0));
    const Lanes<A> dc = load(dw, A(0));
    const Lanes<A> f = load(z, A(0));
    const Lanes<A> df = load(zd, A(0));
    const Lanes<A> a = c * df;
    to[0] = to[0] + v * v;
    to[1] = to[1] + v * d;
    to[2] = to[2] + v * a;
    to[3] = to[3] + a * d;
    to[4] = to[4] + v * (c * f + dc * df);
  });
  const A count = static_cast<A>(n), r = reciprocal_root(sum[0], n, eps);
  const A u = r * (r * (sum[1] / count)), q = r * (sum[2] / count);
  const A along = 3 * q * u - r * (sum[3] / count) - r * (sum[4] / count);
  for (int64_t i = 0; i < n; ++i) {
    const A m = r * x[i], e = r * dx[i], a = w[i] * zd[i];
    gx[i] = r * (w[i] * z[i] + dw[i] * zd[i] + m * along - a * u - e * q);
    gdx[i] = r * (a - m * q);
    gw[i] += z[i] * m + zd[i] * (e - u * m);
    gdw[i] += zd[i] * m;
  }
}

// ---- runs of rows -------------------------------------------------------------------------------------------------------

// A thread's memory and what all rows share.
template <class A> struct Space {
  const NormRope& p;
  A* next;
  A* zero = take();
  A* for_w = take();
  A* for_dw = take();
  const A *w, *dw;

  Space(const NormRope& call, void* memory) : p(call), next(static_cast<A*>(memory)) {
    for (int64_t i = 0; i < p.shape.columns; ++i) zero[i] = A(0);
    w = read_row(p.weight, 0, p.shape.columns, for_w);
    dw = read(p.dweight, RowPlace{}, for_dw);
  }
  A* take() {
    A* const row = next;
    next += norm_rope_space_row(p.shape.columns);
    return row;
  }
  const A* read(const Rows& x, const RowPlace& at, A* space) const {
    return x ? read_row(x, start_of(x, at), p.shape.columns, space) : zero;
  }
  Angles<A> angles(const RowPlace& at) const {
    if (!p.cos) return {};
    return {static_cast<const A*>(p.cos.data) + start_of(p.cos, at),
            static_cast<const A*>(p.sin.data) + start_of(p.sin, at)};
  }
  // gy turned back into `space`; gy itself where nothing was turned.
  const A* turned_back(const Rows& gy, const RowPlace& at, A* space, A* for_gy) const {
    const A* const from = read(gy, at, for_gy);
    const Angles<A> angle = angles(at);
    if (!angle.cos || !gy) return from;
    turn_back(space, from, angle.cos, angle.sin, p.shape.columns / 2);
    return space;
  }
};

template <class A> void rows_of_type(const NormRopeForward& p, int64_t first, int64_t last, void* memory) {
  const int64_t n = p.shape.columns;
  const A eps = static_cast<A>(p.eps);
  Space<A> space(p, memory);
  A *a = space.take(), *da = space.take(), *for_x = space.take(), *for_dx = space.take();
  A *for_y = space.take(), *for_dy = space.take();
  RowPlace at = place_of(p.shape, first);
  for (int64_t row = first; row < last; ++row, next_row(p.shape, &at)) {
    const Angles<A> angle = space.angles(at);
    const A* x = space.read(p.x, at, for_x);
    const int64_t to = start_of(p.y, at), d_to = start_of(p.dy, at);
    A* y = target_row(p.y, to, for_y);
    if (p.dy) {
      A* dy = target_row(p.dy, d_to, for_dy);
      const A* dx = space.read(p.dx, at, for_dx);
      scale_pair(angle.cos ? a : y, angle.cos ? da : dy, x, dx, space.w, space.dw, n, eps);
      if (angle.cos) turn(dy, da, angle.cos, angle.sin, n / 2);
      write_row(p.dy, d_to, n, dy);
    } else {
      scale(angle.cos ? a : y, x, space.w, n, eps);
    }
    if (angle.cos) turn(y, a, angle.cos, angle.sin, n / 2);
    write_row(p.y, to, n, y);
  }
}

template <class A>
void chunks_of_type(const NormRopeBackward& p, const ColumnSums& sums, void* partials, int64_t first, int64_t last,
                    void* memory) {
  const int64_t n = p.shape.columns;
  const A eps = static_cast<A>(p.eps);
  Space<A> space(p, memory);
  A *for_x = space.take(), *for_dx = space.take(), *for_gy = space.take(), *for_z = space.take(),
    *for_zd = space.take();
  A *for_gx = space.take(), *for_gdx = space.take();
  A* const spare[2] = {space.take(), space.take()};
  const Rows* const results[2] = {&p.gweight, &p.gdweight};
  for (int64_t chunk = first; chunk < last; ++chunk) {
    A* g[2];
    for (int i = 0; i < 2; ++i) {
      g[i] = sums.slot[i] < 0 ? spare[i] : static_cast<A*>(partials) + (chunk * sums.slots + sums.slot[i]) * n;
      for (int64_t c = 0; c < n; ++c) g[i][c] = A(0);
    }
    const RowRange range = rows_of_chunk(sums, chunk);
    RowPlace at = place_of(p.shape, range.first);
    for (int64_t row = range.first; row < range.last; ++row, next_row(p.shape, &at)) {
      const A* x = space.read(p.x, at, for_x);
      const A* z = space.turned_back(p.gy, at, for_z, for_gy);
      const int64_t to = start_of(p.gx, at), d_to = start_of(p.gdx, at);
      A* gx = target_row(p.gx, to, for_gx);
      if (p.gdy) {
        const A* zd = space.turned_back(p.gdy, at, for_zd, for_gdx);  // gdx is written after gdy has been read
        A* gdx = target_row(p.gdx, d_to, for_gdx);
        back_pair(gx, gdx, g[0], g[1], x, space.read(p.dx, at, for_dx), space.w, space.dw, z, zd, n, eps);
        write_row(p.gdx, d_to, n, gdx);
      } else {
        back(gx, g[0], x, z, space.w, n, eps);
      }
      write_row(p.gx, to, n, gx);
    }
    for (int i = 0; i < 2; ++i) {  // a call of one row: its sum over rows is itself
      if (!*results[i] || sums.slot[i] >= 0) continue;
      A* target = target_row(*results[i], 0, g[i]);
      for (int64_t c = 0; c < n && target != g[i]; ++c) target[c] = g[i][c];
      write_row(*results[i], 0, n, target);
    }
  }
}

bool is_wide(const NormRope& p) { return p.x.dtype == DType::f64; }

void rows(const NormRopeForward& p, int64_t first, int64_t last, void* space) {
  if (is_wide(p)) rows_of_type<double>(p, first, last, space);
  else rows_of_type<float>(p, first, last, space);
}

void chunks(const NormRopeBackward& p, const ColumnSums& sums, void* partials, int64_t first, int64_t last,
            void* space) {
  if (is_wide(p)) chunks_of_type<double>(p, sums, partials, first, last, space);
  else chunks_of_type<float>(p, sums, partials, first, last, space);
}

template <class A>
void finish_of_type(const NormRopeBackward& p, const ColumnSums& sums, const void* partials, int which, int64_t first,
                    int64_t last, void* space) {
  auto* const total = static_cast<double*>(space);
  auto* const row = reinterpret_cast<A*>(total + p.shape.columns);
  const Rows& to = which == 0 ? p.gweight : p.gdweight;
  for (int64_t segment = first; segment < last; ++segment) {
    finish_sums(sums, to, which, p.shape, static_cast<const A*>(partials), segment, total, row);
  }
}

void finish(const NormRopeBackward& p, const ColumnSums& sums, const void* partials, int which, int64_t first,
            int64_t last, void* space) {
  if (is_wide(p)) finish_of_type<double>(p, sums, partials, which, first, last, space);
  else finish_of_type<float>(p, sums, partials, which, first, last, space);
}

}  // namespace

const NormRopeLoops norm_rope_loops = {rows, chunks, finish};

}  // namespace pyflowmap::PYFLOWMAP_ISA
