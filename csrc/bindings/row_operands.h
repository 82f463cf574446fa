// row_operands.h - the tensors of a row-wise kernel's call: all broadcast to the shape of the first.
#pragma once
#include <initializer_list>

#include "bindings/broadcast.h"
#include "bindings/workspace.h"
#include "common/column_sums.h"

namespace pyflowmap {

// Tensor i as all[i]; those that are None stay null. float64 only where all are.
template <size_t N> void read_all(Tensors& tensors, Rows* const (&all)[N], RowShape* shape) {
  Broadcast broadcast(&tensors, 0);
  for (size_t i = 0; i < N; ++i) broadcast.add(static_cast<int>(i), all[i]);
  if (!broadcast.finish(shape)) return;
  for (const Rows* x : all) {
    if (*x && (x->dtype == DType::f64) != (all[0]->dtype == DType::f64)) tensors.refuse();
  }
}

// Results that rows share must be shared by consecutive rows.
inline void check_sums(Tensors& tensors, std::initializer_list<const Rows*> results, const RowShape& shape) {
  for (const Rows* x : results) {
    if (*x && sharing(*x, shape) == 0) tensors.refuse();
  }
}

// Below it, letting go of the interpreter's lock costs more than it gives.
inline bool is_large(const RowShape& shape) { return rows_of(shape) * shape.columns > 1 << 15; }

}  // namespace pyflowmap
