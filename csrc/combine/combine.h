// combine.h - the contract of `combine`: row-wise linear combinations of up to 8 tensors, and their inner products,
// in one pass over memory.
//
//   Y[k,r,i] = clamp_k( sum_j C[k,j,r,i] X[j,r,i]  (+ C[k,J,r,i] N[r,i]) )         k < K <= 8,  j < J <= 8
//   C[k,j,r,i] = A.scalar[k,j] A.vector[k,j][r]  +  mask[r,i] B.scalar[k,j] B.vector[k,j][r]
//   gram[r,k,l] = sum_i Y[k,r,i] Y[l,r,i]     cross[r,k,j] = sum_i Y[k,r,i] X[j,r,i]     sums[r,k] = sum_i Y[k,r,i]
//
// r runs over rows (samples), i over the elements of a row in *memory order*, which all operands share.
//
// Arithmetic: float32 when no operand is f64 (f32, bf16 and f16 may be mixed, per tensor); float64 when all are.
//   A coefficient is formed in double, rounded once to the arithmetic type. Terms are added in the order of j, noise
//   last, by separately rounded multiplications and additions: every back end and instruction set gives the same bits.
//   A term whose coefficient is exactly 0 (after scalar times vector, and after the mask) is left out: its operand is
//   not read where all its coefficients in that row are 0, and 0 * NaN never arises. A combination of no terms is 0.
// Noise: N[r,i] is the normal number (seed, sample, stream, element) of philox.h, where
//   sample = sample_ids[r / rows_per_sample] (or r / rows_per_sample), element = (r % rows_per_sample) * columns +
//   logical(i), and logical(i) is the row-major index of the element at memory position i.
// Clamp: min(max(y, low), high); NaN stays NaN. Reductions see the clamped value before it is rounded to storage.
// Reductions: float32 (float64 for f64) results, [rows,K,K], [rows,K,J (+1 with noise)], [rows,K], all contiguous;
//   their order of summation is fixed: the same bits for any number of threads, grid or instruction set.
// Aliasing: an output may be exactly an input (same pointer, stride and dtype). Any other overlap is the caller's error.
// Limits: columns * rows_per_sample <= 2^34 with noise. Sizes and strides count elements and are 64 bits wide.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"

namespace pyflowmap {

inline constexpr int kMaxInputs = 8;
inline constexpr int kMaxOutputs = 8;
inline constexpr int kMaxTerms = kMaxInputs + 1;  // the last one is noise
inline constexpr int kMaxDims = 8;

struct Coefficient {  // no initialisers: a call of two terms need not clear the table of 144 (Coefficient{} is zero)
  double scalar;
  const void* vector;  // one factor per row, of type double if vector_is_double, else float; null means 1
  int64_t stride;      // elements between the factors of two rows; 0 shares one factor
  bool vector_is_double;
};

struct Operand {
  void* data = nullptr;    // of an output: null means "formed for the reductions, not stored"
  int64_t row_stride = 0;  // elements; an input may have 0 (one row for all)
  DType dtype = DType::f32;
};

// Maps the memory position of an element inside its row to an index: position is read as mixed-radix digits of `size`
// (outermost first), the index is sum(digit * stride). dims == 0 is the identity.
struct IndexMap {
  int dims = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};
};

struct Noise {
  bool present = false;
  uint64_t seed = 0;
  const int64_t* seed_data = nullptr;  // on the operands' device; added to seed when not null
  uint32_t stream = 0;
  const int64_t* stream_data = nullptr;  // likewise, added to stream
  const int64_t* sample_ids = nullptr;
  int64_t rows_per_sample = 1;
  IndexMap logical;
};

struct Mask {
  const void* data = nullptr;  // f32 (f64 for f64 arithmetic); null means no mask and B is not read
  int64_t row_stride = 0;
  IndexMap index;
};

struct CombineParams {
  int inputs = 0, outputs = 0;
  int64_t rows = 0, columns = 0;
  Operand x[kMaxInputs], y[kMaxOutputs];
  Coefficient a[kMaxOutputs][kMaxTerms];  // [k][j]; [k][kMaxInputs] is the noise; all of a row k < K must be set
  Coefficient b[kMaxOutputs][kMaxTerms];  // read with a mask only
  Noise noise;
  Mask mask;
  bool clamp[kMaxOutputs] = {};
  double low[kMaxOutputs] = {}, high[kMaxOutputs] = {};
  void *gram = nullptr, *cross = nullptr, *sums = nullptr;
  void* workspace = nullptr;  // combine_workspace_bytes(params) bytes on the device; CUDA only
};

// Makes one long row of rows that follow one another and that no number depends on: the same work, and nothing to do per
// row. Callers may use it before any back end.
void flatten_rows(CombineParams* params);

Status combine_cpu(const CombineParams& params);

// CUDA (and the emulator, where stream is ignored).
size_t combine_workspace_bytes(const CombineParams& params);
Status combine_cuda(const CombineParams& params, int device, void* stream);

}  // namespace pyflowmap
