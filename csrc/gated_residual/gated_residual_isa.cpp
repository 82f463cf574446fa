// gated_residual_isa.cpp - the loops of `gated_residual` on the CPU. Compiled once per instruction set into a namespace
// of its own (PYFLOWMAP_ISA = base, v3, v4). Contract: gated_residual.h.
#include "gated_residual/gated_residual_isa.h"

#include "common/row_host.h"

#ifndef PYFLOWMAP_ISA
#define PYFLOWMAP_ISA base
#endif

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

constexpr int kChunk = 512;  // columns that are widened at once

template <class A> struct Space {
  alignas(64) A in[6][kChunk];
  alignas(64) A out[3][kChunk];
  alignas(64) A zero[kChunk] = {};
};

template <class A> PFM_INLINE const A* read_or_zero(const Rows& x, int64_t at, int64_t n, A* space, const A* zero) {
  return x ? read_row(x, at, n, space) : zero;
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class A>
PFM_INLINE void gate_value(A* __restrict y, const A* x, const A* gate, const A* h, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] + gate[i] * h[i];
}

template <class A>
PFM_INLINE void gate_pair(A* __restrict y, A* __restrict dy, const A* x, const A* gate, const A* h, const A* dx,
                          const A* dgate, const A* dh, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = x[i] + gate[i] * h[i];
    dy[i] = dx[i] + (dgate[i] * h[i] + gate[i] * dh[i]);
  }
}

template <class A> void forward(const GatedResidual& p, int64_t first, int64_t last) {
  Space<A> space;
  RowPlace at = place_of(p.shape, first);
  for (int64_t r = first; r < last; ++r, next_row(p.shape, &at)) {
    for (int64_t column = 0; column < p.shape.columns; column += kChunk) {
      const int64_t left = p.shape.columns - column, n = left < kChunk ? left : kChunk;
      const auto read = [&](const Rows& x, int i) {
        return read_or_zero(x, start_of(x, at) + column, n, space.in[i], space.zero);
      };
      const int64_t to = start_of(p.y, at) + column;
      A* y = target_row(p.y, to, space.out[0]);
      if (p.dy) {
        const int64_t d_to = start_of(p.dy, at) + column;
        A* dy = target_row(p.dy, d_to, space.out[1]);
        gate_pair(y, dy, read(p.x, 0), read(p.gate, 1), read(p.h, 2), read(p.dx, 3), read(p.dgate, 4), read(p.dh, 5),
                  n);
        write_row(p.dy, d_to, n, dy);
      } else {
        gate_value(y, read(p.x, 0), read(p.gate, 1), read(p.h, 2), n);
      }
      write_row(p.y, to, n, y);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class A> PFM_INLINE void product(A* __restrict to, const A* a, const A* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = a[i] * b[i];
}
template <class A>
PFM_INLINE void sum_of_products(A* __restrict to, const A* a, const A* b, const A* c, const A* d, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = a[i] * b[i] + c[i] * d[i];
}

template <class A>
void backward(const GatedResidualBackward& p, const ColumnSums& sums, void* partials, int64_t first, int64_t last) {
  Space<A> space;
  const int64_t columns = p.shape.columns;
  const bool both = static_cast<bool>(p.gdy);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const RowRange range = rows_of_chunk(sums, chunk);
    A* const partial = static_cast<A*>(partials) + chunk * sums.slots * columns;
    for (int64_t column = 0; column < columns; column += kChunk) {
      const int64_t left = columns - column, n = left < kChunk ? left : kChunk;
      RowPlace at = place_of(p.shape, range.first);
      for (int64_t r = range.first; r < range.last; ++r, next_row(p.shape, &at)) {
        const auto read = [&](const Rows& x, int i) {
          return read_or_zero(x, start_of(x, at) + column, n, space.in[i], space.zero);
        };
        const A *gate = read(p.gate, 0), *h = read(p.h, 1), *gy = read(p.gy, 2);
        const A* gdy = both ? read(p.gdy, 3) : nullptr;
        if (p.gh) {
          const int64_t to = start_of(p.gh, at) + column;
          A* gh = target_row(p.gh, to, space.out[0]);
          if (both && p.dgate) sum_of_products(gh, gate, gy, read(p.dgate, 4), gdy, n);
          else product(gh, gate, gy, n);
          write_row(p.gh, to, n, gh);
        }
        if (p.gdh && both) {
          const int64_t to = start_of(p.gdh, at) + column;
          A* gdh = target_row(p.gdh, to, space.out[1]);
          product(gdh, gate, gdy, n);
          write_row(p.gdh, to, n, gdh);
        }
        const auto vector = [&](const Rows& to, int which, const auto& term) PFM_INLINED {
          put_or_add(sums, which, to, partial, r == range.first, at, column, n, columns, space.out[2], term);
        };
        if (both && p.dh && p.ggate) {
          const A* dh = read(p.dh, 5);
          vector(p.ggate, 0, [=](int64_t i) PFM_INLINED { return gy[i] * h[i] + gdy[i] * dh[i]; });
        } else {
          vector(p.ggate, 0, [=](int64_t i) PFM_INLINED { return gy[i] * h[i]; });
        }
        if (both) vector(p.gdgate, 1, [=](int64_t i) PFM_INLINED { return gdy[i] * h[i]; });
      }
    }
  }
}

template <class A>
void finish(const GatedResidualBackward& p, const ColumnSums& sums, const void* partials, int which, int64_t first,
            int64_t last, void* space) {
  auto* total = static_cast<double*>(space);
  const Rows& to = which == 0 ? p.ggate : p.gdgate;
  for (int64_t segment = first; segment < last; ++segment) {
    finish_sums(sums, to, which, p.shape, static_cast<const A*>(partials), segment, total,
                reinterpret_cast<A*>(total + p.shape.columns));
  }
}

bool is_wide(const Rows& x) { return x.dtype == DType::f64; }

void run_forward(const GatedResidual& p, int64_t first, int64_t last) {
  if (is_wide(p.y)) forward<double>(p, first, last);
  else forward<float>(p, first, last);
}

void run_backward(const GatedResidualBackward& p, const ColumnSums& sums, void* partials, int64_t first, int64_t last) {
  if (is_wide(p.h)) backward<double>(p, sums, partials, first, last);
  else backward<float>(p, sums, partials, first, last);
}

void run_finish(const GatedResidualBackward& p, const ColumnSums& sums, const void* partials, int which, int64_t first,
                int64_t last, void* space) {
  if (is_wide(p.h)) finish<double>(p, sums, partials, which, first, last, space);
  else finish<float>(p, sums, partials, which, first, last, space);
}

}  // namespace

const GatedResidualLoops gated_residual_loops = {run_forward, run_backward, run_finish};

}  // namespace pyflowmap::PYFLOWMAP_ISA
