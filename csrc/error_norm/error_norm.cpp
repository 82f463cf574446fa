// error_norm.cpp - `error_norm` on the CPU: chooses the instruction set, cuts the rows, shares them among threads and
// adds up the partial sums in a fixed order. The loops are in error_norm_isa.cpp; the contract is error_norm.h.
#include "error_norm/error_norm.h"

#include "common/isa.h"
#include "common/row_work.h"
#include "error_norm/error_norm_isa.h"

namespace pyflowmap {
namespace {

ErrorNormUnits units_for(Isa isa) {
#if defined(PYFLOWMAP_HAS_V4)
  if (isa == Isa::v4) return v4::error_norm_units;
#endif
#if defined(PYFLOWMAP_HAS_V3)
  if (isa >= Isa::v3) return v3::error_norm_units;
#endif
  (void)isa;
  return base::error_norm_units;
}

}  // namespace

Status error_norm_cpu(const ErrorNorm& p) {
  const int64_t rows = rows_of(p.shape), columns = p.shape.columns;
  const int64_t units_per_row = columns == 0 ? 1 : (columns + kErrorNormUnit - 1) / kErrorNormUnit;
  const int64_t units = rows * units_per_row;
  if (units == 0) return {};
  const Memory space = memory_of(units * static_cast<int64_t>(sizeof(double)));
  if (!space) return kNoMemory;
  auto* partials = static_cast<double*>(space.get());
  const ErrorNormUnits run = units_for(active_isa());
  share(units, row_threads(rows * columns, p.terms + 2),
        [&](int64_t first, int64_t last) { run(p, units_per_row, partials, first, last); });
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0.0;
    for (int64_t unit = 0; unit < units_per_row; ++unit) sum += partials[row * units_per_row + unit];
    if (p.x.dtype == DType::f64) static_cast<double*>(p.sums)[row] = sum;
    else static_cast<float*>(p.sums)[row] = static_cast<float>(sum);
  }
  return {};
}

}  // namespace pyflowmap
