// dual_linear.cpp - `dual_linear` on the CPU: chooses the instruction set and shares the outputs among threads. The
// loops are in dual_linear_isa.cpp; the contract is dual_linear.h.
#include "dual_linear/dual_linear.h"

#include "common/isa.h"
#include "common/parallel.h"
#include "dual_linear/dual_linear_isa.h"

namespace pyflowmap {
namespace {

constexpr int64_t kOutputsPerUnit = 16;

// Below this many products a second thread costs more than it gains.
constexpr int64_t kProductsPerThread = 1 << 18;

DualLinearOutputs outputs_for(Isa isa) {
#if defined(PYFLOWMAP_HAS_V4)
  if (isa == Isa::v4) return v4::dual_linear_outputs;
#endif
#if defined(PYFLOWMAP_HAS_V3)
  if (isa >= Isa::v3) return v3::dual_linear_outputs;
#endif
  (void)isa;
  return base::dual_linear_outputs;
}

}  // namespace

Status dual_linear_cpu(const DualLinearParams& p) {
  if (!within_limits(p)) return {1, "rows, sizes or dtype out of bounds"};
  const DualLinearOutputs outputs = outputs_for(active_isa());
  const int64_t products = p.outputs * p.inputs * p.rows * (p.dx.data ? 2 : 1);
  const int64_t units = (p.outputs + kOutputsPerUnit - 1) / kOutputsPerUnit;
  share(units, products / kProductsPerThread, [&](int64_t first, int64_t last) {
    const int64_t end = last * kOutputsPerUnit;
    outputs(p, first * kOutputsPerUnit, end < p.outputs ? end : p.outputs);
  });
  return {};
}

}  // namespace pyflowmap
