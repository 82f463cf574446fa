// attention.h - the contract of `attention`: softmax attention, its tangent, and the backward pass through either.
//
// Of one sample b and one head h (keys and values of head h / (heads / kv_heads)), with c = scale:
//
//   S = c Q K' + mask          P = softmax(S) over the keys that are seen           O  = P V
//   dS = c (dQ K' + Q dK')     W = P * dS       mu = rowsum(W)                      dO = P dV + W V - mu * O
//   lse = log sum exp(S)
//
// Forward. O and W V + P dV accumulate under one running maximum: two accumulators, six products (four where K and V
// have no tangent: dk and dv null; dq, dk, dv may each be null, and all of them: the plain forward, two products).
// Working memory does not grow with queries * keys.
//
// Backward through O alone (go given, gdo null), with D = rowsum(go * O):
//   gV = P' go        gS = P * (go V' - D)        gQ = c gS K        gK = c gS' Q
// Backward through O and dO (go or gdo or both; a null one is zero), a = rowsum(gdo * O),
// D = rowsum(go * O) + rowsum(gdo * dO) - a * mu, dP = P * (dS - mu):
//   gV = P' go + dP' gdo                                gdV = P' gdo
//   gdS = P * (gdo V' - a)                              gS = P * (go V' + gdo dV' + gdo V' * (dS - mu) - a * dS - D)
//   gQ = c (gS K + gdS dK)    gK = c (gS' Q + gdS' dQ)  gdQ = c gdS K           gdK = c gdS' Q
// Keys and values that heads share sum the gradients of those heads.
//
// Which keys a query sees: all, except where
//   causal              j > i (queries == keys)
//   lengths             j >= lengths[b]; lengths are clamped to [0, keys]
//   mask, boolean       mask[b, h, i, j] == 0; the others add mask[b, h, i, j] to S (minus infinity hides a key)
// A hidden key has weight exactly 0, and its values are not looked at: 0 * NaN never arises from causal and lengths. A
// query that sees nothing has O = dO = 0, lse = -infinity, and takes and gives no gradient.
//
// Arithmetic: float32 (float64 where the tensors are), accumulation likewise; 16-bit operands enter products as they
//   are, P, W and their gradients are rounded to the operands' type before a product where the hardware asks for that
//   (mma), and mu sums the W that was rounded. For float32 no product is of fewer than 24 bits.
// Same bits for any number of threads, grid and order of blocks: no atomics.
// Layout: rows of a head are adjacent numbers; (i, j, k) of Rows is (sample, head, token). All tensors share one dtype,
//   but lse and mu: float32 (float64 for f64), contiguous (batch, heads, queries); mask: bool as bytes, or any dtype.
// Limits: head_dim and value_dim 1 to 256 (the CPU takes any), heads a multiple of kv_heads. Sizes may be 0.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/rows.h"
#include "common/status.h"

namespace pyflowmap {

struct AttentionMask {
  const void* data = nullptr;
  bool boolean = false;  // one byte each; else of type dtype, added
  DType dtype = DType::f32;
  int64_t stride[4] = {};  // sample, head, query, key; 0 where it is shared
};

struct AttentionProblem {
  int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, keys = 0;
  int head_dim = 0, value_dim = 0;
  DType dtype = DType::f32;
  double scale = 1.0;
  bool causal = false;
  AttentionMask mask;
  const int64_t* lengths = nullptr;  // one per sample, on the device of the tensors
  Rows q, k, v, dq, dk, dv;          // heads of k, v, dk, dv: kv_heads
};

struct AttentionForward : AttentionProblem {
  Rows o, d_o;          // d_o null: no tangent asked
  void* lse = nullptr;  // null: not asked
  void* mu = nullptr;
};

struct AttentionBackward : AttentionProblem {
  Rows o, d_o;  // what forward gave; d_o, dq, dk, dv and mu are read where gdo is given
  const void *lse = nullptr, *mu = nullptr;
  Rows go, gdo;
  Rows gq, gk, gv, gdq, gdk, gdv;  // null: not asked. All heads of gk, gv, gdk, gdv: kv_heads
  void* workspace = nullptr;       // attention_backward_workspace_bytes(p) bytes, on 256; CUDA only
};

Status attention_forward_cpu(const AttentionForward& p);
Status attention_backward_cpu(const AttentionBackward& p);

// CUDA (and the emulator, where device and stream are ignored). float64 is refused.
Status attention_forward_cuda(const AttentionForward& p, int device, void* stream);
size_t attention_backward_workspace_bytes(const AttentionBackward& p);
Status attention_backward_cuda(const AttentionBackward& p, int device, void* stream);

}  // namespace pyflowmap
