// row_work.h - how a row-wise CPU kernel shares its work among threads, and the memory that it needs meanwhile.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>

#include "common/column_sums.h"
#include "common/parallel.h"
#include "common/status.h"

namespace pyflowmap {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// On a cache line; null where there is none left.
inline Memory memory_of(int64_t bytes) {
  return Memory(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 127) / 64 * 64));
}

constexpr Status kNoMemory = {1, "out of memory"};

// Below this many numbers, read or written, a second thread costs more than it gains.
inline int64_t row_threads(int64_t elements, int tensors) { return elements * tensors / 65536; }

// work(sums, partials, first, last) -> bool over the chunks, then finish(sums, partials, which, first, last, space) over
// the rows of every result that is a sum; space: columns doubles, then columns numbers of the arithmetic type.
template <class Work, class Finish>
Status backward_with_sums(const Rows* const* results, int count, const RowShape& shape, bool wide, int tensors,
                          const Work& work, const Finish& finish) {
  ColumnSums sums;
  const int64_t rows = rows_of(shape), size = wide ? 8 : 4;
  // Few enough partials that they stay in the cache, enough of them for all threads.
  const int64_t chunk = rows / 64 < 4 ? 4 : rows / 64 > 64 ? 64 : rows / 64;
  if (!plan_sums(results, count, shape, chunk, &sums)) return {1, "a gradient is shared by rows that are apart"};
  if (sums.chunks == 0 || shape.columns == 0) return {};
  const Memory partials = memory_of(sums.partials(shape.columns) * size);
  if (!partials) return kNoMemory;
  std::atomic<bool> fine{true};
  const int64_t threads = row_threads(rows * shape.columns, tensors);
  share(sums.chunks, threads, [&](int64_t first, int64_t last) {
    if (!work(sums, partials.get(), first, last)) fine = false;
  });
  for (int which = 0; which < count && fine; ++which) {
    if (sums.slot[which] < 0) continue;
    share(sums.rows / sums.shares[which], threads, [&](int64_t first, int64_t last) {
      const Memory space = memory_of(shape.columns * 16);
      if (space) finish(sums, partials.get(), which, first, last, space.get());
      else fine = false;
    });
  }
  return fine ? Status{} : kNoMemory;
}

}  // namespace pyflowmap
