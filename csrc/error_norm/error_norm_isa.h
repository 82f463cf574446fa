// error_norm_isa.h - what error_norm.cpp (decides) and error_norm_isa.cpp (computes) share.
#pragma once
#include "error_norm/error_norm.h"

namespace pyflowmap {

inline constexpr int64_t kErrorNormUnit = 16384;  // elements of one row

// Units are numbered row by row; each writes its sum of squares to partials[unit].
using ErrorNormUnits = void (*)(const ErrorNorm&, int64_t units_per_row, double* partials, int64_t first, int64_t last);

namespace base { void error_norm_units(const ErrorNorm&, int64_t, double*, int64_t, int64_t); }
namespace v3 { void error_norm_units(const ErrorNorm&, int64_t, double*, int64_t, int64_t); }
namespace v4 { void error_norm_units(const ErrorNorm&, int64_t, double*, int64_t, int64_t); }

}  // namespace pyflowmap
