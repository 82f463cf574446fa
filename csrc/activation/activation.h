// activation.h - the contract of `activation`: a function of every element, alone or as the gate of another tensor.
//
//   y = f(a)                 dy = f'(a) da                                          b null: plain
//   y = f(a) b               dy = f'(a) b da + f(a) db                              a gated unit (SwiGLU, GEGLU)
//
//   backward through y       ga  = f'(a) b gy                                       gb  = f(a) gy
//   through y and dy         ga += (f''(a) b da + f'(a) db) gdy                     gb += f'(a) da gdy
//                            gda = f'(a) b gdy                                      gdb = f(a) gdy
//
// f: silu a/(1+e^-a); gelu a Phi(a); gelu_tanh, its approximation; relu; sigmoid; tanh. f'(0) of relu is 0, as torch's;
// what it cuts off is 0 even where the tangent is not finite. At +-infinity f, f' and f'' are their limits; NaN stays.
//
// Arithmetic: float32 (storage f32, bf16 and f16, mixed per tensor), rounded once; float64 where all tensors are f64
//   (CPU only). Accuracy in float32: activation_math.h.
// Layout: operands and results are Rows of one shape, or one long row where all lie in the same dense order.
// A tangent that is null is zero; a result that is null is not wanted. No result overlaps an operand.
#pragma once
#include "common/rows.h"
#include "common/status.h"

namespace pyflowmap {

enum class ActivationKind : int { silu = 0, gelu, gelu_tanh, relu, sigmoid, tanh };
inline constexpr int kActivationKinds = 6;

struct Activation {
  RowShape shape;
  ActivationKind kind = ActivationKind::silu;
  bool backward = false;
  Rows a, b, da, db;
  Rows y, dy;             // results of the forward; dy null: the value alone
  Rows gy, gdy;           // of the backward: cotangents, either may be null
  Rows ga, gb, gda, gdb;  // its results
};

Status activation_cpu(const Activation& problem);
Status activation_cuda(const Activation& problem, int device, void* stream);

}  // namespace pyflowmap
