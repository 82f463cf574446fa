// norm_modulate_isa.cpp - the loops of `norm_modulate` on the CPU. Compiled once per instruction set into a namespace of
// its own (PYFLOWMAP_ISA = base, v3, v4). Contract and derivatives: norm_modulate.h.
//
// A row stays in the first-level cache for its three walks: means, products of what is left, results.
#include "norm_modulate/norm_modulate_isa.h"

#include <cmath>

#include "common/row_host.h"

#ifndef PYFLOWMAP_ISA
#define PYFLOWMAP_ISA base
#endif

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

// The rows of a call as A: where they lie, or widened into rows of `space`; the last one of them is zeros.
template <class A> class RowReader {
 public:
  RowReader(void* space, int rows, int64_t columns)
      : space_(static_cast<A*>(space)),
        step_(space_row(columns)),
        columns_(columns),
        zeros_(row(rows - 1)) {
    for (int64_t c = 0; c < columns; ++c) zeros_[c] = A(0);
  }
  A* row(int i) const { return space_ + i * step_; }
  const A* read(const Rows& x, const RowPlace& at, int i) const {
    return x ? read_row(x, start_of(x, at), columns_, row(i)) : zeros_;
  }

 private:
  A* space_;
  int64_t step_, columns_;
  A* zeros_;
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <class A> struct Moments { A mean, r, dmean, slope; };  // slope: mean(n dx~)

template <class A> PFM_INLINE Moments<A> moments(const NormModulate& p, const A* x) {
  const int64_t n = p.shape.columns;
  const A per = A(1) / static_cast<A>(n);
  Moments<A> m = {};
  A sum[1];
  if (p.layer) {
    row_sums<A, 1>(n, sum, [=](Lanes<A>(&to)[1], const auto& load) PFM_INLINED { to[0] = to[0] + load(x, A(0)); });
    m.mean = sum[0] * per;
  }
  const auto mean = Lanes<A>::all(m.mean);
  row_sums<A, 1>(n, sum, [=](Lanes<A>(&to)[1], const auto& load) PFM_INLINED {
    const Lanes<A> v = load(x, m.mean) - mean;
    to[0] = to[0] + v * v;
  });
  m.r = A(1) / std::sqrt(sum[0] * per + static_cast<A>(p.eps));
  return m;
}

template <class A> PFM_INLINE Moments<A> moments(const NormModulate& p, const A* x, const A* dx) {
  const int64_t n = p.shape.columns;
  const A per = A(1) / static_cast<A>(n);
  Moments<A> m = {};
  A sum[2];
  if (p.layer) {
    row_sums<A, 2>(n, sum, [=](Lanes<A>(&to)[2], const auto& load) PFM_INLINED {
      to[0] = to[0] + load(x, A(0));
      to[1] = to[1] + load(dx, A(0));
    });
    m.mean = sum[0] * per;
    m.dmean = sum[1] * per;
  }
  const auto mean = Lanes<A>::all(m.mean), dmean = Lanes<A>::all(m.dmean);
  row_sums<A, 2>(n, sum, [=](Lanes<A>(&to)[2], const auto& load) PFM_INLINED {
    const Lanes<A> v = load(x, m.mean) - mean;
    to[0] = to[0] + v * v;
    to[1] = to[1] + v * (load(dx, m.dmean) - dmean);
  });
  m.r = A(1) / std::sqrt(sum[0] * per + static_cast<A>(p.eps));
  m.slope = sum[1] * m.r * per;
  return m;
}

template <class A>
PFM_INLINE void value(A* __restrict y, const A* x, const A* scale, const A* shift, Moments<A> m, int64_t n) {
  for (int64_t c = 0; c < n; ++c) y[c] = (x[c] - m.mean) * m.r * (A(1) + scale[c]) + shift[c];
}

template <class A>
PFM_INLINE void pair(A* __restrict y, A* __restrict dy, const A* x, const A* scale, const A* shift, const A* dx,
                     const A* dscale, const A* dshift, Moments<A> m, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const A normal = (x[c] - m.mean) * m.r, factor = A(1) + scale[c];
    const A dnormal = m.r * ((dx[c] - m.dmean) - normal * m.slope);
    y[c] = normal * factor + shift[c];
    dy[c] = dnormal * factor + (normal * dscale[c] + dshift[c]);
  }
}

template <class A> void forward(const NormModulate& p, int64_t first, int64_t last, void* space) {
  const int64_t n = p.shape.columns;
  const RowReader<A> rows(space, kForwardSpace, n);
  RowPlace at = place_of(p.shape, first);
  for (int64_t r = first; r < last; ++r, next_row(p.shape, &at)) {
    const A* x = rows.read(p.x, at, 0);
    const A *scale = rows.read(p.scale, at, 1), *shift = rows.read(p.shift, at, 2);
    const int64_t to = start_of(p.y, at);
    A* y = target_row(p.y, to, rows.row(6));
    if (p.dy) {
      const A *dx = rows.read(p.dx, at, 3), *dscale = rows.read(p.dscale, at, 4), *dshift = rows.read(p.dshift, at, 5);
      const int64_t d_to = start_of(p.dy, at);
      A* dy = target_row(p.dy, d_to, rows.row(7));
      pair(y, dy, x, scale, shift, dx, dscale, dshift, moments(p, x, dx), n);
      write_row(p.dy, d_to, n, dy);
    } else {
      value(y, x, scale, shift, moments(p, x), n);
    }
    write_row(p.y, to, n, y);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class A> struct Operands { const A *x, *scale, *gy, *dx, *dscale, *gdy; };

// What the gradients of a row need of it; without tangents those of dx and q are zero.
template <class A> struct Slopes {
  A r, mean, dmean, p_mean, q_mean;
  A of_p, of_x, of_q, joint;  // mean(n p~), mean(n dx~), mean(n q~), mean(q~ dx~) - of_q of_x
};

template <class A> PFM_INLINE Slopes<A> slopes(const NormModulateBackward& p, const Operands<A>& o) {
  const int64_t n = p.shape.columns;
  const A per = A(1) / static_cast<A>(n);
  const auto one = Lanes<A>::all(A(1));
  Slopes<A> s = {};
  A sum[2];
  if (p.layer) {
    row_sums<A, 2>(n, sum, [=](Lanes<A>(&to)[2], const auto& load) PFM_INLINED {
      to[0] = to[0] + load(o.x, A(0));
      to[1] = to[1] + load(o.gy, A(0)) * (load(o.scale, A(0)) + one);
    });
    s.mean = sum[0] * per;
    s.p_mean = sum[1] * per;
  }
  const auto mean = Lanes<A>::all(s.mean), p_mean = Lanes<A>::all(s.p_mean);
  row_sums<A, 2>(n, sum, [=](Lanes<A>(&to)[2], const auto& load) PFM_INLINED {
    const Lanes<A> x = load(o.x, s.mean) - mean;
    to[0] = to[0] + x * x;
    to[1] = to[1] + x * (load(o.gy, s.p_mean) * (load(o.scale, A(0)) + one) - p_mean);
  });
  s.r = A(1) / std::sqrt(sum[0] * per + static_cast<A>(p.eps));
  s.of_p = sum[1] * s.r * per;
  return s;
}

template <class A> PFM_INLINE Slopes<A> slopes_of_both(const NormModulateBackward& p, const Operands<A>& o) {
  const int64_t n = p.shape.columns;
  const A per = A(1) / static_cast<A>(n);
  const auto one = Lanes<A>::all(A(1));
  Slopes<A> s = {};
  if (p.layer) {
    A sum[4];
    row_sums<A, 4>(n, sum, [=](Lanes<A>(&to)[4], const auto& load) PFM_INLINED {
      const Lanes<A> factor = load(o.scale, A(0)) + one, gdy = load(o.gdy, A(0));
      to[0] = to[0] + load(o.x, A(0));
      to[1] = to[1] + load(o.dx, A(0));
      to[2] = to[2] + (load(o.gy, A(0)) * factor + gdy * load(o.dscale, A(0)));
      to[3] = to[3] + gdy * factor;
    });
    s.mean = sum[0] * per;
    s.dmean = sum[1] * per;
    s.p_mean = sum[2] * per;
    s.q_mean = sum[3] * per;
  }
  const auto mean = Lanes<A>::all(s.mean), dmean = Lanes<A>::all(s.dmean), p_mean = Lanes<A>::all(s.p_mean),
             q_mean = Lanes<A>::all(s.q_mean);
  A sum[5];
  row_sums<A, 5>(n, sum, [=](Lanes<A>(&to)[5], const auto& load) PFM_INLINED {
    const Lanes<A> factor = load(o.scale, A(0)) + one, gdy = load(o.gdy, s.q_mean);
    const Lanes<A> x = load(o.x, s.mean) - mean, dx = load(o.dx, s.dmean) - dmean;
    const Lanes<A> q = gdy * factor - q_mean;
    to[0] = to[0] + x * x;
    to[1] = to[1] + x * (load(o.gy, s.p_mean) * factor + gdy * load(o.dscale, A(0)) - p_mean);
    to[2] = to[2] + x * dx;
    to[3] = to[3] + x * q;
    to[4] = to[4] + q * dx;
  });
  s.r = A(1) / std::sqrt(sum[0] * per + static_cast<A>(p.eps));
  s.of_p = sum[1] * s.r * per;
  s.of_x = sum[2] * s.r * per;
  s.of_q = sum[3] * s.r * per;
  s.joint = sum[4] * per - s.of_q * s.of_x;
  return s;
}

template <class A>
PFM_INLINE void gradient(A* __restrict gx, A* __restrict normal, const Operands<A>& o, Slopes<A> s, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    normal[c] = (o.x[c] - s.mean) * s.r;
    gx[c] = s.r * ((o.gy[c] * (A(1) + o.scale[c]) - s.p_mean) - normal[c] * s.of_p);
  }
}

template <class A>
PFM_INLINE void gradients(A* __restrict gx, A* __restrict gdx, A* __restrict normal, A* __restrict dnormal,
                          const Operands<A>& o, Slopes<A> s, int64_t n) {
  const A from_q = s.r * s.of_x, from_x = s.r * s.of_q, from_n = s.r * s.r * s.joint;
  for (int64_t c = 0; c < n; ++c) {
    const A factor = A(1) + o.scale[c], at = (o.x[c] - s.mean) * s.r;
    const A p = o.gy[c] * factor + o.gdy[c] * o.dscale[c], q = o.gdy[c] * factor;
    normal[c] = at;
    dnormal[c] = s.r * ((o.dx[c] - s.dmean) - at * s.of_x);
    gdx[c] = s.r * ((q - s.q_mean) - at * s.of_q);
    gx[c] = s.r * ((p - s.p_mean) - at * s.of_p) - from_q * gdx[c] - from_x * dnormal[c] - from_n * at;
  }
}

template <class A>
void backward(const NormModulateBackward& p, const ColumnSums& sums, void* partials, int64_t first, int64_t last,
              void* space) {
  using P = NormModulateBackward;
  const int64_t n = p.shape.columns;
  const RowReader<A> rows(space, kBackwardSpace, n);
  const bool both = static_cast<bool>(p.gdy);
  A *normal = rows.row(6), *dnormal = rows.row(7), *other = rows.row(10);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const RowRange range = rows_of_chunk(sums, chunk);
    A* const partial = static_cast<A*>(partials) + chunk * sums.slots * n;
    RowPlace at = place_of(p.shape, range.first);
    for (int64_t r = range.first; r < range.last; ++r, next_row(p.shape, &at)) {
      Operands<A> o = {};
      o.x = rows.read(p.x, at, 0);
      o.scale = rows.read(p.scale, at, 1);
      o.gy = rows.read(p.gy, at, 2);
      const int64_t to = start_of(p.gx, at);
      A* gx = target_row(p.gx, to, rows.row(8));
      const A* gy = o.gy;
      const auto vector = [&](P::Vector which, const auto& term) PFM_INLINED {
        put_or_add(sums, which, p.vector[which], partial, r == range.first, at, 0, n, n, other, term);
      };
      if (both) {
        o.dx = rows.read(p.dx, at, 3);
        o.dscale = rows.read(p.dscale, at, 4);
        o.gdy = rows.read(p.gdy, at, 5);
        const int64_t d_to = start_of(p.gdx, at);
        A* gdx = target_row(p.gdx, d_to, rows.row(9));
        gradients(gx, gdx, normal, dnormal, o, slopes_of_both(p, o), n);
        write_row(p.gdx, d_to, n, gdx);
        const A* gdy = o.gdy;
        vector(P::kScale, [=](int64_t c) PFM_INLINED { return gy[c] * normal[c] + gdy[c] * dnormal[c]; });
        vector(P::kDScale, [=](int64_t c) PFM_INLINED { return gdy[c] * normal[c]; });
        vector(P::kDShift, [=](int64_t c) PFM_INLINED { return gdy[c]; });
      } else {
        gradient(gx, normal, o, slopes(p, o), n);
        vector(P::kScale, [=](int64_t c) PFM_INLINED { return gy[c] * normal[c]; });
      }
      write_row(p.gx, to, n, gx);
      vector(P::kShift, [=](int64_t c) PFM_INLINED { return gy[c]; });
    }
  }
}

template <class A>
void finish(const NormModulateBackward& p, const ColumnSums& sums, const void* partials, int which, int64_t first,
            int64_t last, void* space) {
  auto* total = static_cast<double*>(space);
  for (int64_t segment = first; segment < last; ++segment) {
    finish_sums(sums, p.vector[which], which, p.shape, static_cast<const A*>(partials), segment, total,
                reinterpret_cast<A*>(total + p.shape.columns));
  }
}

bool is_wide(const Rows& x) { return x.dtype == DType::f64; }

void run_forward(const NormModulate& p, int64_t first, int64_t last, void* space) {
  if (is_wide(p.x)) forward<double>(p, first, last, space);
  else forward<float>(p, first, last, space);
}

void run_backward(const NormModulateBackward& p, const ColumnSums& sums, void* partials, int64_t first, int64_t last,
                  void* space) {
  if (is_wide(p.x)) backward<double>(p, sums, partials, first, last, space);
  else backward<float>(p, sums, partials, first, last, space);
}

void run_finish(const NormModulateBackward& p, const ColumnSums& sums, const void* partials, int which, int64_t first,
                int64_t last, void* space) {
  if (is_wide(p.x)) finish<double>(p, sums, partials, which, first, last, space);
  else finish<float>(p, sums, partials, which, first, last, space);
}

}  // namespace

const NormModulateLoops norm_modulate_loops = {run_forward, run_backward, run_finish};

}  // namespace pyflowmap::PYFLOWMAP_ISA
