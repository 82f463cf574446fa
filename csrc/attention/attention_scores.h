// attention_scores.h - what is done to rows of scores: which keys are seen, the exponential, the running softmax.
#pragma once
#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "attention/attention_product.h"

namespace pyflowmap::PYFLOWMAP_ISA {
namespace {

template <class A> constexpr A kHidden = -std::numeric_limits<A>::infinity();

// ---- exponential ----------------------------------------------------------------------------------------------------

// e^x = 2^n e^r, r = x - n ln 2 in two parts, e^r = 1 + r + r^2 q(r) with q fitted for the smallest relative error
// (3e-9). Below 2 ulp; 0 for -infinity and for what would be subnormal; NaN stays. x <= 88.
PFM_INLINE Vector<float> exponential(const Vector<float>& x) {
  typedef uint32_t Int __attribute__((vector_size(kVectorBytes)));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> shifted = x * 1.442695041f + kRound;
  const Vector<float> n = shifted - kRound;
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.1219444e-4f;  // n * 355/512 is exact
  Vector<float> q = r * 1.381459847e-3f + 8.368716887e-3f;
  q = q * r + 4.166838805e-2f;
  q = q * r + 1.666652063e-1f;
  q = q * r + 4.999999345e-1f;
  const Vector<float> e = (q * r) * r + r + 1.0f;
  Int bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // the low bits of `shifted` are n
  Vector<float> power;
  memcpy(&power, &bits, sizeof power);
  const Vector<float> value = e * power;
  return x < -87.3f ? Vector<float>{} : value;
}

// float64 serves gradcheck: the library's own will do.
PFM_INLINE Vector<double> exponential(const Vector<double>& x) {
  Vector<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

PFM_INLINE float exponential(float x) {
  const Vector<float> all = x - Vector<float>{};
  return exponential(all)[0];
}
PFM_INLINE double exponential(double x) { return std::exp(x); }

// ---- which keys are seen --------------------------------------------------------------------------------------------

PFM_INLINE int64_t keys_seen(const AttentionProblem& p, int64_t sample) {
  if (!p.lengths) return p.keys;
  const int64_t length = p.lengths[sample];
  return length < 0 ? 0 : length < p.keys ? length : p.keys;
}

template <class A, class T> PFM_INLINE A number(T x) { return static_cast<A>(to_float(x)); }
template <class A> PFM_INLINE A number(double x) { return static_cast<A>(x); }

template <class A, class T> PFM_INLINE void add_row(A* __restrict s, A* ds, const T* mask, int64_t stride, int n) {
  for (int j = 0; j < n; ++j) {
    const A value = number<A>(mask[j * stride]);
    const bool hidden = value == kHidden<A>;
    s[j] = hidden ? value : s[j] + value;
    if (ds) ds[j] = hidden ? A(0) : ds[j];
  }
}
// The mask of n keys onto a row of scores that are scaled already; the tangent (or null) of a hidden key is zero.
template <class A>
void mask_row(const AttentionMask& mask, int64_t sample, int64_t head, int64_t query, int64_t key, int n, A* s, A* ds) {
  const int64_t at = sample * mask.stride[0] + head * mask.stride[1] + query * mask.stride[2] + key * mask.stride[3];
  const int64_t stride = mask.stride[3];
  if (mask.boolean) {
    const uint8_t* seen = static_cast<const uint8_t*>(mask.data) + at;
    for (int j = 0; j < n; ++j) {
      const bool hidden = seen[j * stride] == 0;
      s[j] = hidden ? kHidden<A> : s[j];
      if (ds) ds[j] = hidden ? A(0) : ds[j];
    }
  } else if (mask.dtype == DType::f32) {
    add_row(s, ds, static_cast<const float*>(mask.data) + at, stride, n);
  } else if (mask.dtype == DType::bf16) {
    add_row(s, ds, static_cast<const bf16*>(mask.data) + at, stride, n);
  } else if (mask.dtype == DType::f16) {
    add_row(s, ds, static_cast<const f16*>(mask.data) + at, stride, n);
  } else {
    add_row(s, ds, static_cast<const double*>(mask.data) + at, stride, n);
  }
}

// ---- the running softmax --------------------------------------------------------------------------------------------

// Of the rows of a query block: the maximum so far, what the accumulators are to be multiplied with, and, lane by lane,
// the sums of P and W.
template <class A> struct Softmax { A *maximum, *alpha, *sum, *mu; };

template <class A> PFM_INLINE A largest(const Vector<A>& lanes) {
  A x[kLanes<A>];
  put(x, lanes);
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = x[i + width] > x[i] ? x[i + width] : x[i];
  }
  return x[0];
}

template <class A> PFM_INLINE A total(const A* lanes) {
  A x[kLanes<A>];
  memcpy(x, lanes, sizeof x);
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}

template <class A> bool has_nan(const A* s, int n) {
  bool nan = false;
  for (int j = 0; j < n; ++j) nan |= __builtin_isnan(s[j]) != 0;
  return nan;
}

// Scores of row r to weights: s becomes P relative to the maximum so far, ds (null: no tangent) becomes W. `width` is n
// in whole vectors; beyond n, and where a key is hidden, both become 0. `scale` has been applied if there is a
// mask.
template <class A, bool kTangent>
PFM_INLINE void soften_row(A* __restrict s, A* __restrict ds, int n, int width, A scale, A scale_tangent,
                           const Softmax<A>& state, int r) {
  constexpr int kL = kLanes<A>;
  const int used = n > 0 ? round_up(n, kL) : 0;
  memset(s + used, 0, static_cast<size_t>(width - used) * sizeof(A));
  if (kTangent) memset(ds + used, 0, static_cast<size_t>(width - used) * sizeof(A));
  Vector<A> most = kHidden<A> - Vector<A>{};
  for (int j = 0; j < used; j += kL) {
    Vector<A> x = load(s + j) * scale;
    for (int i = n - j; i < kL; ++i) {  // the last vector only
      x[i] = kHidden<A>;
      if (kTangent) ds[j + i] = A(0);
    }
    most = x > most ? x : most;
    put(s + j, x);
  }
  const A before = state.maximum[r];
  A maximum = largest<A>(most);
  maximum = maximum > before ? maximum : before;
  state.alpha[r] = A(1);
  if (maximum == kHidden<A>) {
    if (!has_nan(s, used)) {
      memset(s, 0, static_cast<size_t>(used) * sizeof(A));
      if (kTangent) memset(ds, 0, static_cast<size_t>(used) * sizeof(A));
      return;
    }
    maximum = A(0);  // nothing but NaN is seen: let it through
  }
  A* sum = state.sum + r * kL;
  A* mu = state.mu + r * kL;
  Vector<A> sums = load(sum), mus = kTangent ? load(mu) : Vector<A>{};
  if (maximum != before) {
    const A alpha = exponential(before - maximum);
    state.alpha[r] = alpha;
    state.maximum[r] = maximum;
    sums *= alpha;
    mus *= alpha;
  }
  for (int j = 0; j < used; j += kL) {
    const Vector<A> weight = exponential(load(s + j) - maximum);
    put(s + j, weight);
    sums += weight;
    if (kTangent) {
      const Vector<A> tangent = weight * (load(ds + j) * scale_tangent);
      put(ds + j, tangent);
      mus += tangent;
    }
  }
  put(sum, sums);
  if (kTangent) put(mu, mus);
}

}  // namespace
}  // namespace pyflowmap::PYFLOWMAP_ISA
