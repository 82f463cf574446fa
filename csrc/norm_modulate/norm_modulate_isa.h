// norm_modulate_isa.h - what norm_modulate.cpp (decides) and norm_modulate_isa.cpp (computes) share.
#pragma once
#include "common/column_sums.h"
#include "norm_modulate/norm_modulate.h"

namespace pyflowmap {

// A row of the loops' space: a whole number of cache lines, in numbers.
inline int64_t space_row(int64_t columns) { return (columns + 15) / 16 * 16; }
constexpr int kForwardSpace = 9, kBackwardSpace = 12;  // rows of it, of the arithmetic type

struct NormModulateLoops {
  void (*rows)(const NormModulate&, int64_t first, int64_t last, void* space);
  // partials: of the arithmetic type
  void (*chunks)(const NormModulateBackward&, const ColumnSums&, void* partials, int64_t first, int64_t last,
                 void* space);
  // The sums of vector `which`; `space`: columns doubles, then columns numbers of the arithmetic type.
  void (*finish)(const NormModulateBackward&, const ColumnSums&, const void* partials, int which, int64_t first,
                 int64_t last, void* space);
};

namespace base { extern const NormModulateLoops norm_modulate_loops; }
namespace v3 { extern const NormModulateLoops norm_modulate_loops; }
namespace v4 { extern const NormModulateLoops norm_modulate_loops; }

}  // namespace pyflowmap
