// gated_residual.h - the contract of `gated_residual`, the exit of an adaLN branch, in one pass over memory.
//
//   forward    y = x + gate h                    dy = dx + dgate h + gate dh
//   backward   gh = gate gy + dgate gdy          ggate = sum of gy h + gdy dh
//              gdh = gate gdy                    gdgate = sum of gdy h          (x and dx have the gradients gy and gdy)
//
// Element by element over rows; a tangent or a gradient that is null is zero, or not asked for. `ggate` and `gdgate` are
// sums over the rows that share them (stride 0), which must be consecutive: column_sums.h.
// Arithmetic: float32 where no operand is f64 (f32, bf16 and f16 may be mixed); float64 when all are, CPU only.
// Results overlap nothing. Sizes and strides count elements and are 64 bits wide.
#pragma once
#include <cstddef>

#include "common/rows.h"
#include "common/status.h"

namespace pyflowmap {

struct GatedResidual {
  RowShape shape;
  Rows x, gate, h, dx, dgate, dh;
  Rows y, dy;
};

struct GatedResidualBackward {
  RowShape shape;
  Rows gate, h, dgate, dh, gy, gdy;
  Rows gh, ggate, gdh, gdgate;
  void* workspace = nullptr;  // gated_residual_workspace_bytes(p) bytes on the device; CUDA only
};

Status gated_residual_cpu(const GatedResidual& p);
Status gated_residual_backward_cpu(const GatedResidualBackward& p);

// CUDA (and the emulator, where stream is ignored).
Status gated_residual_cuda(const GatedResidual& p, int device, void* stream);
size_t gated_residual_workspace_bytes(const GatedResidualBackward& p);
Status gated_residual_backward_cuda(const GatedResidualBackward& p, int device, void* stream);

}  // namespace pyflowmap
