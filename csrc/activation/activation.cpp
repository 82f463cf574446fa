// activation.cpp - `activation` on the CPU: chooses the instruction set and shares the elements among threads. The loops
// are in activation_isa.cpp; the contract is activation.h.
#include "activation/activation.h"

#include "activation/activation_isa.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace pyflowmap {
namespace {

// Below this many elements a second thread costs more than it gains (about 10 microseconds of one core).
constexpr int64_t kElementsPerThread = 16384;

ActivationUnits units_for(Isa isa) {
#if defined(PYFLOWMAP_HAS_V4)
  if (isa == Isa::v4) return v4::activation_units;
#endif
#if defined(PYFLOWMAP_HAS_V3)
  if (isa >= Isa::v3) return v3::activation_units;
#endif
  (void)isa;
  return base::activation_units;
}

}  // namespace

Status activation_cpu(const Activation& p) {
  const RowShape& shape = p.shape;
  const int64_t rows = shape.outer[0] * shape.outer[1] * shape.outer[2];
  if (rows == 0 || shape.columns == 0) return {};
  const int64_t units_per_row = (shape.columns + kActivationUnit - 1) / kActivationUnit;
  const ActivationUnits run = units_for(active_isa());
  share(rows * units_per_row, rows * shape.columns / kElementsPerThread,
        [&](int64_t first, int64_t last) { run(p, units_per_row, first, last); });
  return {};
}

}  // namespace pyflowmap
