// gated_residual.cpp - `gated_residual` on the CPU: chooses the instruction set, cuts the work and shares it among
// threads. The loops are in gated_residual_isa.cpp; the contract is gated_residual.h.
#include "gated_residual/gated_residual.h"

#include "common/isa.h"
#include "common/row_work.h"
#include "gated_residual/gated_residual_isa.h"

namespace pyflowmap {
namespace {

const GatedResidualLoops& loops() {
#if defined(PYFLOWMAP_HAS_V4)
  if (active_isa() == Isa::v4) return v4::gated_residual_loops;
#endif
#if defined(PYFLOWMAP_HAS_V3)
  if (active_isa() >= Isa::v3) return v3::gated_residual_loops;
#endif
  return base::gated_residual_loops;
}

}  // namespace

Status gated_residual_cpu(const GatedResidual& p) {
  const GatedResidualLoops& run = loops();
  const int64_t rows = rows_of(p.shape);
  share(rows, row_threads(rows * p.shape.columns, p.dy ? 8 : 4),
        [&](int64_t first, int64_t last) { run.rows(p, first, last); });
  return {};
}

Status gated_residual_backward_cpu(const GatedResidualBackward& p) {
  const GatedResidualLoops& run = loops();
  const Rows* results[] = {&p.ggate, &p.gdgate};
  return backward_with_sums(
      results, 2, p.shape, p.h.dtype == DType::f64, p.gdy ? 8 : 4,
      [&](const ColumnSums& sums, void* partials, int64_t first, int64_t last) {
        run.chunks(p, sums, partials, first, last);
        return true;
      },
      [&](const ColumnSums& sums, const void* partials, int which, int64_t first, int64_t last, void* space) {
        run.finish(p, sums, partials, which, first, last, space);
      });
}

}  // namespace pyflowmap
