// dual_linear_isa.h - what dual_linear.cpp (decides) and dual_linear_isa.cpp (computes) share.
#pragma once
#include "dual_linear/dual_linear.h"

namespace pyflowmap {

// The outputs first to last, of every row.
using DualLinearOutputs = void (*)(const DualLinearParams&, int64_t first, int64_t last);

namespace base { void dual_linear_outputs(const DualLinearParams&, int64_t, int64_t); }
namespace v3 { void dual_linear_outputs(const DualLinearParams&, int64_t, int64_t); }
namespace v4 { void dual_linear_outputs(const DualLinearParams&, int64_t, int64_t); }

}  // namespace pyflowmap
