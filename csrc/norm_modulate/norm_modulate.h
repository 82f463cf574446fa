// norm_modulate.h - the contract of `norm_modulate`, the entrance of an adaLN branch, in one pass over memory.
//
//   n = (x - mean) r,  r = (mean((x - mean)^2) + eps)^(-1/2)          kind rms: mean = 0
//   forward    y = n (1 + scale) + shift
//              dy = dn (1 + scale) + n dscale + dshift,  dn = J dx
//   J v = r (v~ - n mean(n v~)),  v~ = v - mean(v) (rms: v)            symmetric, so it is its own transpose
//
//   backward   with p = gy (1 + scale) + gdy dscale and q = gdy (1 + scale), the cotangents of n and dn:
//              gx  = J p - r c_x J q - r c_q dn - r^2 (mean(q~ dx~) - c_q c_x) n,    c_x = mean(n dx~),  c_q = mean(n q~)
//              gdx = J q
//              gscale = sum of gy n + gdy dn      gshift = sum of gy      gdscale = sum of gdy n      gdshift = sum of gdy
//
// Means run over a row, the last dimension. A tangent or a cotangent that is null is zero, a result that is null is not
// asked for. The gradients of the vectors are sums over the rows that share them (stride 0), which must be consecutive:
// column_sums.h.
// Arithmetic: float32 where no operand is f64 (f32, bf16 and f16 may be mixed); float64 when all are, CPU only. The mean
// first, then the squares of what is left: nothing cancels.
// Results overlap nothing. Sizes and strides count elements and are 64 bits wide; rows may have any length.
#pragma once
#include <cstddef>

#include "common/rows.h"
#include "common/status.h"

namespace pyflowmap {

struct NormModulate {
  RowShape shape;
  bool layer = true;  // or rms
  double eps = 0.0;
  Rows x, scale, shift, dx, dscale, dshift;
  Rows y, dy;
};

struct NormModulateBackward {
  RowShape shape;
  bool layer = true;
  double eps = 0.0;
  Rows x, scale, dx, dscale, gy, gdy;
  Rows gx, gdx;
  enum Vector { kScale, kShift, kDScale, kDShift, kVectors };
  Rows vector[kVectors];      // their gradients
  void* workspace = nullptr;  // norm_modulate_workspace_bytes(p) bytes on the device; CUDA only
};

Status norm_modulate_cpu(const NormModulate& p);
Status norm_modulate_backward_cpu(const NormModulateBackward& p);

// CUDA (and the emulator, where stream is ignored).
Status norm_modulate_cuda(const NormModulate& p, int device, void* stream);
size_t norm_modulate_workspace_bytes(const NormModulateBackward& p);
Status norm_modulate_backward_cuda(const NormModulateBackward& p, int device, void* stream);

}  // namespace pyflowmap
