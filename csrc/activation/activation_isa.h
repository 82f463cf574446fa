// activation_isa.h - what activation.cpp (decides) and activation_isa.cpp (computes) share.
#pragma once
#include "activation/activation.h"

namespace pyflowmap {

inline constexpr int64_t kActivationUnit = 4096;  // elements of one row: 16 KB of every float32 operand

// Units are numbered row by row: unit u is part u % units_per_row of row u / units_per_row.
using ActivationUnits = void (*)(const Activation&, int64_t units_per_row, int64_t first_unit, int64_t last_unit);

namespace base { void activation_units(const Activation&, int64_t, int64_t, int64_t); }
namespace v3 { void activation_units(const Activation&, int64_t, int64_t, int64_t); }
namespace v4 { void activation_units(const Activation&, int64_t, int64_t, int64_t); }

}  // namespace pyflowmap
