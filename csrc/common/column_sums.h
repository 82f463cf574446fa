// column_sums.h - results that several rows share (the gradient of one vector per sample) are sums over those rows. Rows
// are cut into chunks; a chunk adds up its own rows in their order, its partials are added up in the order of the
// chunks: the cut depends on the shape alone, so any number of threads and any grid give the same bits.
#pragma once
#include <cstdint>

#include "common/rows.h"

namespace pyflowmap {

inline int64_t rows_of(const RowShape& shape) { return shape.outer[0] * shape.outer[1] * shape.outer[2]; }

// How many consecutive rows share one row of `x`; 0 where the rows that share one are not consecutive, which no kernel
// adds up.
inline int64_t sharing(const Rows& x, const RowShape& shape) {
  int64_t rows = 1;
  bool inside = true;
  for (int d = 2; d >= 0; --d) {
    if (shape.outer[d] == 1) continue;
    const bool shared = x.stride[d] == 0;
    if (shared && !inside) return 0;
    inside &= shared;
    if (shared) rows *= shape.outer[d];
  }
  return rows;
}

// kMost results at most; those that are null have no slot, those that no rows share are written row by row.
struct ColumnSums {
  static constexpr int kMost = 4;
  int64_t rows = 0;        // of the call
  int64_t chunk = 1;       // rows of a chunk, the last one of a period may have fewer
  int64_t period = 1;      // rows that share a row of the result with the shortest period: no chunk crosses its end
  int64_t per_period = 1;  // chunks
  int64_t chunks = 0;
  int slots = 0;             // results that are sums
  int slot[kMost] = {};      // -1: not a sum
  int64_t shares[kMost] = {};  // rows

  // Partials [chunks, slots, columns] of the arithmetic type.
  int64_t partials(int64_t columns) const { return chunks * slots * columns; }
};

// `chunk` is what suits the machine: a number of rows that depends on the shape alone. False: see `sharing`.
inline bool plan_sums(const Rows* const* results, int count, const RowShape& shape, int64_t chunk, ColumnSums* sums) {
  sums->rows = rows_of(shape);
  int64_t period = sums->rows;
  for (int i = 0; i < count; ++i) {
    sums->slot[i] = -1;
    if (!*results[i]) continue;
    sums->shares[i] = sharing(*results[i], shape);
    if (sums->shares[i] == 0) return false;
    if (sums->shares[i] == 1) continue;
    sums->slot[i] = sums->slots++;
    period = sums->shares[i] < period ? sums->shares[i] : period;
  }
  sums->period = period;
  sums->chunk = chunk < period ? chunk : period;
  sums->per_period = period == 0 ? 0 : (period + sums->chunk - 1) / sums->chunk;
  sums->chunks = period == 0 ? 0 : sums->rows / period * sums->per_period;
  return true;
}

struct RowRange { int64_t first, last; };

PFM_INLINE RowRange rows_of_chunk(const ColumnSums& sums, int64_t chunk) {
  const int64_t begin = chunk / sums.per_period * sums.period, first = begin + chunk % sums.per_period * sums.chunk;
  const int64_t last = first + sums.chunk, end = begin + sums.period;
  return {first, last < end ? last : end};
}

}  // namespace pyflowmap
