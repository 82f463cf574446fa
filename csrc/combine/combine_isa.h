// combine_isa.h - what combine.cpp (decides) and combine_isa.cpp (computes) share.
#pragma once
#include "combine/combine.h"

namespace pyflowmap {

// The work is cut into units: `columns_per_unit` consecutive elements of one row. The cut depends on the shape alone,
// so that the order of every sum does too.
struct CombinePlan {
  int64_t columns_per_unit = 0, units_per_row = 0;
  bool stage[kMaxOutputs] = {};   // an output that another output still has to read as an input is stored last
  bool stream[kMaxOutputs] = {};  // stores bypass the cache: the output is too large to be found there again
  bool direct = false;            // one or two outputs, all operands stored as the arithmetic type, nothing but terms
  int reductions = 0;             // gram (upper triangle, row by row), cross, sums: numbers per unit
  double* partials = nullptr;     // [rows * units_per_row, reductions]
};

using CombineUnits = void (*)(const CombineParams&, const CombinePlan&, int64_t first_unit, int64_t last_unit);

namespace base { void combine_units(const CombineParams&, const CombinePlan&, int64_t, int64_t); }
namespace v3 { void combine_units(const CombineParams&, const CombinePlan&, int64_t, int64_t); }
namespace v4 { void combine_units(const CombineParams&, const CombinePlan&, int64_t, int64_t); }

}  // namespace pyflowmap
