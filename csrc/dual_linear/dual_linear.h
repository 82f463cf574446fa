// dual_linear.h - the contract of `dual_linear`: a linear layer and its tangent on few rows, one pass over the weight.
//
//   y[r, o] = sum_i x[r, i] W[o, i] + b[o]          dy[r, o] = sum_i dx[r, i] W[o, i]
//
// With few rows the time is that of reading W. Two products read it twice; this reads it once for value and tangent.
// dx, dy and b may be null: y alone, which is also how a tangent without its value is made, x = dx and no b.
//
// Arithmetic: float32, rounded once to the storage type. On the CPU an element is 16 partial sums, i modulo 16, added
//   as a fixed tree: the same bits for any number of rows and threads, and on instruction sets that round a * b + c
//   once (v3, v4); base rounds twice. On the device a warp makes an element: the same bits for any grid.
// Layout: x, dx, y, dy (rows, inputs or outputs), W (outputs, inputs), all of one dtype (f32, bf16, f16); the last
//   dimension is dense, rows may step by any stride; b is dense. y and dy overlap nothing.
// Limits: rows 1 to kMostLinearRows, inputs and outputs at least 1.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"

namespace pyflowmap {

constexpr int kMostLinearRows = 8;

struct LinearRows {
  void* data = nullptr;
  int64_t stride = 0;  // elements from row to row

  explicit operator bool() const { return data != nullptr; }
};

struct DualLinearParams {
  int64_t rows = 0, inputs = 0, outputs = 0;
  DType dtype = DType::f32;
  LinearRows x, dx, weight, y, dy;
  const void* bias = nullptr;
};

inline bool within_limits(const DualLinearParams& p) {
  return p.rows >= 1 && p.rows <= kMostLinearRows && p.inputs >= 1 && p.outputs >= 1 && p.dtype != DType::f64;
}

Status dual_linear_cpu(const DualLinearParams& p);
Status dual_linear_cuda(const DualLinearParams& p, int device, void* stream);

}  // namespace pyflowmap
