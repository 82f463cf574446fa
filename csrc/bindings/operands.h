// operands.h - how the tensors of one call lie in memory: rows that step evenly, one dense order inside them, no
// forbidden overlap. Shared by every kernel that works row by row.
#pragma once
#include <cstdint>

#include "bindings/dlpack.h"
#include "combine/combine.h"

namespace pyflowmap {

// What every operand of a call shares.
struct Layout {
  dlpack::Tensor like;
  int leading = 0;
  int64_t rows = 1, columns = 1;
  bool in_order = true;  // memory order inside a row is row-major
  int order[64];         // inner dimensions, outermost in memory first
  int inner = 0;
};

bool storage_type(const dlpack::Tensor& t, DType* out);
bool is_int64(const dlpack::Tensor& t);
bool same_device(const dlpack::Tensor& a, const dlpack::Tensor& b);

// Sorts the inner dimensions by stride and checks that they are dense: a row is one run of memory.
bool find_layout(const dlpack::Tensor& like, int leading, Layout* layout);

// Whether `dims` dimensions step as one; their stride (untouched where all have size 1).
bool even_stride(const int64_t* shape, const int64_t* strides, int dims, int64_t* stride);

// Positions of a row in memory order -> the index with the given strides per dimension; the identity where it is that.
bool make_map(const Layout& layout, const int64_t* strides, IndexMap* map);

// Checks shape, device and order against the layout; finds the stride between rows.
bool read_operand(const dlpack::Tensor& t, const Layout& layout, Operand* out);

// An output may be exactly an input. Expanded or self-overlapping outputs, partial overlaps and outputs that share
// memory are refused.
bool aliasing_is_fine(const Operand* x, int inputs, const Operand* y, int outputs, const Layout& layout);

}  // namespace pyflowmap
