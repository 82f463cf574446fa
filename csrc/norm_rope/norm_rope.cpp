// norm_rope.cpp - `norm_rope` on the CPU: chooses the instruction set, cuts the work and shares it among threads. The
// loops are in norm_rope_isa.cpp; the contract is norm_rope.h.
#include "norm_rope/norm_rope.h"

#include "common/isa.h"
#include "common/row_work.h"
#include "norm_rope/norm_rope_isa.h"

namespace pyflowmap {
namespace {

const NormRopeLoops& loops() {
#if defined(PYFLOWMAP_HAS_V4)
  if (active_isa() == Isa::v4) return v4::norm_rope_loops;
#endif
#if defined(PYFLOWMAP_HAS_V3)
  if (active_isa() >= Isa::v3) return v3::norm_rope_loops;
#endif
  return base::norm_rope_loops;
}

Memory space_for(const NormRope& p) {
  return memory_of(kNormRopeSpace * norm_rope_space_row(p.shape.columns) * (p.x.dtype == DType::f64 ? 8 : 4));
}

}  // namespace

Status norm_rope_cpu(const NormRopeForward& p) {
  const NormRopeLoops& run = loops();
  const int64_t rows = rows_of(p.shape);
  std::atomic<bool> fine{true};
  share(rows, row_threads(rows * p.shape.columns, p.dy ? 4 : 2), [&](int64_t first, int64_t last) {
    const Memory space = space_for(p);
    if (space) run.rows(p, first, last, space.get());
    else fine = false;
  });
  return fine ? Status{} : kNoMemory;
}

Status norm_rope_backward_cpu(const NormRopeBackward& p) {
  const NormRopeLoops& run = loops();
  const Rows* const results[] = {&p.gweight, &p.gdweight};
  return backward_with_sums(
      results, 2, p.shape, p.x.dtype == DType::f64, p.gdy ? 6 : 3,
      [&](const ColumnSums& sums, void* partials, int64_t first, int64_t last) {
        const Memory space = space_for(p);
        if (space) run.chunks(p, sums, partials, first, last, space.get());
        return static_cast<bool>(space);
      },
      [&](const ColumnSums& sums, const void* partials, int which, int64_t first, int64_t last, void* space) {
        run.finish(p, sums, partials, which, first, last, space);
      });
}

}  // namespace pyflowmap
