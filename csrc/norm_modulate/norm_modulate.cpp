// norm_modulate.cpp - `norm_modulate` on the CPU: chooses the instruction set, cuts the work and shares it among threads.
// The loops are in norm_modulate_isa.cpp; the contract is norm_modulate.h.
#include "norm_modulate/norm_modulate.h"

#include "common/isa.h"
#include "common/row_work.h"
#include "norm_modulate/norm_modulate_isa.h"

namespace pyflowmap {
namespace {

const NormModulateLoops& loops() {
#if defined(PYFLOWMAP_HAS_V4)
  if (active_isa() == Isa::v4) return v4::norm_modulate_loops;
#endif
#if defined(PYFLOWMAP_HAS_V3)
  if (active_isa() >= Isa::v3) return v3::norm_modulate_loops;
#endif
  return base::norm_modulate_loops;
}

Memory space_for(int rows, int64_t columns, const Rows& x) {
  return memory_of(rows * space_row(columns) * (x.dtype == DType::f64 ? 8 : 4));
}

}  // namespace

Status norm_modulate_cpu(const NormModulate& p) {
  const NormModulateLoops& run = loops();
  const int64_t rows = rows_of(p.shape);
  std::atomic<bool> fine{true};
  share(rows, row_threads(rows * p.shape.columns, p.dy ? 8 : 4), [&](int64_t first, int64_t last) {
    const Memory space = space_for(kForwardSpace, p.shape.columns, p.x);
    if (space) run.rows(p, first, last, space.get());
    else fine = false;
  });
  return fine ? Status{} : kNoMemory;
}

Status norm_modulate_backward_cpu(const NormModulateBackward& p) {
  const NormModulateLoops& run = loops();
  const Rows* results[NormModulateBackward::kVectors];
  for (int i = 0; i < NormModulateBackward::kVectors; ++i) results[i] = &p.vector[i];
  return backward_with_sums(
      results, NormModulateBackward::kVectors, p.shape, p.x.dtype == DType::f64, p.gdy ? 8 : 4,
      [&](const ColumnSums& sums, void* partials, int64_t first, int64_t last) {
        const Memory space = space_for(kBackwardSpace, p.shape.columns, p.x);
        if (space) run.chunks(p, sums, partials, first, last, space.get());
        return static_cast<bool>(space);
      },
      [&](const ColumnSums& sums, const void* partials, int which, int64_t first, int64_t last, void* space) {
        run.finish(p, sums, partials, which, first, last, space);
      });
}

}  // namespace pyflowmap
