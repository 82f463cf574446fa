// error_norm.h - the contract of `error_norm`: how large a combination is, every element measured by a tolerance of its
// own, in one pass over memory.
//
//   sums[r] = sum_i ( f[r] sum_j c_j K_j[r,i] / (atol + rtol max(|x[r,i]|, |y[r,i]|)) )^2            j < J <= 7
//
// r runs over samples, i over the elements of one in *memory order*, which all operands share. It is the error of an
// adaptive Runge-Kutta step: K_j its stages, f the length of the step, x and y the states before and after it.
//
// Arithmetic: float32 (storage f32, bf16 and f16, mixed per tensor), partial sums added in double; float64 where all
//   operands are f64 (CPU only). c_j, f, rtol and atol are double, rounded once to the arithmetic type.
// f null is 1. Where f[r] is 0 nothing of row r is read and its sum is 0: a sample that waits may hold anything.
// NaN in any operand makes the sum NaN; atol > 0, so that 0/0 never arises.
// The order of summation is fixed by the number of columns: a row's bits depend neither on the other rows nor on the
//   number of threads, the grid, or (on the CPU) more than the fused multiply-adds of the instruction set.
#pragma once
#include <cstddef>

#include "common/rows.h"
#include "common/status.h"

namespace pyflowmap {

struct ErrorNorm {
  static constexpr int kMostTerms = 7;
  RowShape shape;  // outer {1, 1, samples}
  int terms = 0;
  Rows k[kMostTerms], x, y;
  double c[kMostTerms] = {};
  const double* factor = nullptr;  // [samples]
  double rtol = 0.0, atol = 0.0;
  void* sums = nullptr;       // [samples] float, or double where the operands are
  void* workspace = nullptr;  // error_norm_workspace_bytes(problem) on the device; CUDA only
};

Status error_norm_cpu(const ErrorNorm& problem);

size_t error_norm_workspace_bytes(const ErrorNorm& problem);
Status error_norm_cuda(const ErrorNorm& problem, int device, void* stream);

}  // namespace pyflowmap
