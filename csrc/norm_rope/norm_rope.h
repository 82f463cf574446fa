// norm_rope.h - RMS norm of every head, then rotary positions, in one pass; with a tangent, and backward.
//
//   n = r x,   r = (mean x^2 + eps)^-1/2         per row x of E columns: one head of one token
//   y = R (w n),   R [a, b] = [c a - s b, c b + s a]   on the two halves of a row; without angles R = 1
//
//   forward    y;  with tangents   dy = R (dw n + w dn),   e = r dx,   u = mean(n e),   dn = e - u n
//
//   backward   z = R' gy   (R' turns back),   g = w z
//       gx = r (g - n mean(n g))                                        gw = sum over rows of z n
//   through both, with   zd = R' gdy,   a = w zd,   q = mean(n a),   g = w z + dw zd
//       gx = r (g - n mean(n g) + n (3 q u - mean(a e)) - a u - e q)    gw = sum of z n + zd dn
//       gdx = r (a - n q)                                               gdw = sum of zd n
//
// A tangent that is not given is zero. Arithmetic is float, double where everything is float64; what is stored is rounded
// once. Each operand is read once and each result written once: a row stays in registers (CUDA, up to 256 columns) or in
// the first-level cache (CPU) between its sums and its result. Angles have no tangent and no gradient.
//
// Limits: fewer than 2^31 rows; float64 on the CPU only, and then every operand is float64. Storage types may differ
// from operand to operand otherwise. Results overlap no operand.
// Deterministic: sums over rows are those of common/column_sums.h.
#pragma once
#include <cstddef>

#include "common/rows.h"
#include "common/status.h"

namespace pyflowmap {

struct NormRope {
  RowShape shape;  // rows: (batch, tokens, heads), the order of a projection's result; columns
  double eps = 0.0;
  Rows x, dx;
  Rows weight, dweight;  // one for all rows
  Rows cos, sin;         // half as many columns, float (double with float64); both or neither
};

struct NormRopeForward : NormRope {
  Rows y, dy;  // dy may be missing
};

struct NormRopeBackward : NormRope {
  Rows gy, gdy;                     // one of them may be missing
  Rows gx, gdx, gweight, gdweight;  // those that are wanted; gdx and gdweight need gdy
  void* workspace = nullptr;        // on the device: norm_rope_workspace_bytes
};

Status norm_rope_cpu(const NormRopeForward& p);
Status norm_rope_backward_cpu(const NormRopeBackward& p);
Status norm_rope_cuda(const NormRopeForward& p, int device, void* stream);
Status norm_rope_backward_cuda(const NormRopeBackward& p, int device, void* stream);
size_t norm_rope_workspace_bytes(const NormRopeBackward& p);

}  // namespace pyflowmap
