// norm_rope_isa.h - what norm_rope.cpp (decides) and norm_rope_isa.cpp (computes) share.
#pragma once
#include "common/column_sums.h"
#include "norm_rope/norm_rope.h"

namespace pyflowmap {

struct NormRopeLoops {
  void (*rows)(const NormRopeForward&, int64_t first, int64_t last, void* space);
  void (*chunks)(const NormRopeBackward&, const ColumnSums&, void* partials, int64_t first, int64_t last, void* space);
  void (*finish)(const NormRopeBackward&, const ColumnSums&, const void* partials, int which, int64_t first,
                 int64_t last, void* space);
};

// The rows of scratch that a thread needs, of the arithmetic type.
constexpr int kNormRopeSpace = 13;
PFM_INLINE int64_t norm_rope_space_row(int64_t columns) { return (columns + 15) / 16 * 16; }

namespace base { extern const NormRopeLoops norm_rope_loops; }
namespace v3 { extern const NormRopeLoops norm_rope_loops; }
namespace v4 { extern const NormRopeLoops norm_rope_loops; }

}  // namespace pyflowmap
