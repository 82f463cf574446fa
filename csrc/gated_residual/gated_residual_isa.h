// gated_residual_isa.h - what gated_residual.cpp (decides) and gated_residual_isa.cpp (computes) share.
#pragma once
#include "common/column_sums.h"
#include "gated_residual/gated_residual.h"

namespace pyflowmap {

struct GatedResidualLoops {
  void (*rows)(const GatedResidual&, int64_t first, int64_t last);
  // partials: of the arithmetic type
  void (*chunks)(const GatedResidualBackward&, const ColumnSums&, void* partials, int64_t first, int64_t last);
  // The sums of result `which`; `space`: columns doubles, then columns numbers of the arithmetic type.
  void (*finish)(const GatedResidualBackward&, const ColumnSums&, const void* partials, int which, int64_t first,
                 int64_t last, void* space);
};

namespace base { extern const GatedResidualLoops gated_residual_loops; }
namespace v3 { extern const GatedResidualLoops gated_residual_loops; }
namespace v4 { extern const GatedResidualLoops gated_residual_loops; }

}  // namespace pyflowmap
