// time_embedding.h - two times per sample as cosines and sines, in one pass; with tangents, and backward.
//
//   y = [cos(w a), sin(w a), cos(w b), sin(w b)]        a = s,  b = t - s (span) or t;  w: h frequencies
//   dy = [-w da sin(w a), w da cos(w a), ...]           da = ds,  db = dt - ds or dt
//
//   backward, g = [g1, g2, ...] per time    ga = sum w (g2 cos(w a) - g1 sin(w a))
//   through both, gd = [d1, d2, ...]        ga = the same - da sum w^2 (d1 cos(w a) + d2 sin(w a)),   gda = as ga, of gd
//   gs = ga - gb (span) or ga,   gt = gb;   gds, gdt alike
//
// Angles w a are float whatever the results are (double where every operand is float64, on the CPU only): in bfloat16 w a
// is off by up to 0.4 radians at w = 100. Cosine and sine of an angle of any size are right to one ulp, its range reduced
// in full. What is stored is rounded once. A tangent that is not given is zero. Frequencies have no tangent and no gradient here.
// Deterministic: a sum is over one sample, its order a matter of h alone.
#pragma once
#include "common/rows.h"
#include "common/status.h"

namespace pyflowmap {

struct TimeEmbedding {
  int64_t batch = 0, frequencies = 0;
  bool span = true;
  // Of the three strides only the first counts. Times are one column, w is dense, float (double with float64).
  Rows s, t, ds, dt, w;
};

struct TimeEmbeddingForward : TimeEmbedding {
  Rows y, dy;  // (batch, 4 h); dy may be missing
};

struct TimeEmbeddingBackward : TimeEmbedding {
  Rows gy, gdy;           // one of them may be missing
  Rows gs, gt, gds, gdt;  // those that are wanted; the last two need gdy
};

Status time_embedding_cpu(const TimeEmbeddingForward& p);
Status time_embedding_backward_cpu(const TimeEmbeddingBackward& p);
Status time_embedding_cuda(const TimeEmbeddingForward& p, int device, void* stream);
Status time_embedding_backward_cuda(const TimeEmbeddingBackward& p, int device, void* stream);

}  // namespace pyflowmap
