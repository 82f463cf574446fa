// activation_math.h - the activation functions of one number with their first two derivatives, on CPU and device.
//
// In float32 everything is made of two functions without branches, so that a loop over them vectorises:
//   decay(t) = (e^-t, e^-t - 1), t >= 0       within 1.5 ulp, the difference relative to itself; subnormals included
//   upper_tail(t) = 1 - Phi(t),  t >= 0       within 4 ulp, down to where it underflows
// Polynomials are own minimax fits. A sigmoid of |x| and what is left to 1 are both formed without cancellation, so f is
// relatively accurate in both tails, where x / (1 + e^-x) overflows and 1 + erf(x) cancels. Measured over +-130, in ulp of
// the largest term of the sum that f' and f'' are: f within 6, f' within 6, f'' within 10; gelu_tanh |w| times that, which
// is the rounding of its argument w. (Below 1e-34 the error is absolute: subnormal factors.) Arguments are cut off where
// the function has reached its limit: infinity gives the limit, not NaN; comparisons are written so that NaN passes.
#pragma once
#include <cmath>

#include "activation/activation.h"
#include "common/dtype.h"

namespace pyflowmap {

template <class A> struct Decay { A e, less_one; };
template <class A> struct Jet { A f, d1, d2; };  // f, f', f''

template <class A> struct Limits;  // beyond these e^-t is 0, and a function its limit
template <> struct Limits<float> { static constexpr float decay = 120.0f, gelu = 15.0f, gelu_tanh = 12.0f; };
template <> struct Limits<double> { static constexpr double decay = 800.0, gelu = 40.0, gelu_tanh = 30.0; };

template <class A> PFM_INLINE A at_most(A t, A limit) { return t > limit ? limit : t; }  // NaN stays
template <class A> PFM_INLINE A at_least(A t, A limit) { return t < limit ? limit : t; }

PFM_INLINE float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
PFM_INLINE double magnitude(double x) { return x < 0.0 ? -x : x; }
PFM_INLINE float with_sign_of(float t, float x) { return float_of(bits_of(t) | (bits_of(x) & 0x80000000u)); }  // t >= 0
PFM_INLINE double with_sign_of(double t, double x) { return std::copysign(t, x); }

#if defined(__CUDA_ARCH__)
PFM_INLINE float inverse(float x) { return __fdividef(1.0f, x); }  // 1 <= x < 20: 1 ulp, a third of the instructions
#else
PFM_INLINE float inverse(float x) { return 1.0f / x; }
#endif
PFM_INLINE double inverse(double x) { return 1.0 / x; }

// e^-(t + low), 0 <= t <= 120, |low| a small part of it.
PFM_INLINE Decay<float> decay(float t, float low = 0.0f) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which lands in the low bits
  const float shifted = (t + low) * -1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = n * -0.693359375f - t;  // ln 2 = high (10 bits: the product is exact) + low
  r = n * 2.12194440e-4f + r - low;
  float p = 1.9845899e-4f;
  p = p * r + 1.39408931e-3f;
  p = p * r + 8.33338965e-3f;
  p = p * r + 4.16663587e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;  // e^r - 1
  // 2^n in two factors, since n reaches below -126.
  const int32_t whole = static_cast<int32_t>(bits_of(shifted) - 0x4b400000u), half = whole >> 1;
  const float first = float_of(static_cast<uint32_t>(half + 127) << 23);
  const float second = float_of(static_cast<uint32_t>(whole - half + 127) << 23);
  const float power = first * second;
  return {(first * p + first) * second, power * p + (power - 1.0f)};
}
PFM_INLINE Decay<double> decay(double t, double low = 0.0) { return {std::exp(-(t + low)), std::expm1(-(t + low))}; }

// 1 - Phi(t), and e^(-t^2/2), 0 <= t <= limit.
PFM_INLINE float upper_tail(float t, float* bell) {
  // t^2 to twice the precision: its rounding alone would cost t^2 / 4 ulp.
  const float high = float_of(bits_of(t) & 0xfffff000u);
  *bell = decay(0.5f * high * high, 0.5f * (t - high) * (t + high)).e;
  // (t + 4) (1 - Phi(t)) e^(t^2/2) is smooth in (t - 4) / (t + 4).
  const float scale = inverse(t + 4.0f), q = (t - 4.0f) * scale;
  float p = -1.34196671e-4f;
  p = p * q + 1.74658504e-4f;
  p = p * q + 1.5684081e-3f;
  p = p * q - 3.51021043e-3f;
  p = p * q - 7.52400421e-3f;
  p = p * q + 6.04034886e-2f;
  p = p * q - 1.86523661e-1f;
  p = p * q + 3.87136906e-1f;
  p = p * q - 6.07896566e-1f;
  p = p * q + 7.55285144e-1f;
  return *bell * (p * scale);
}
PFM_INLINE double upper_tail(double t, double* bell) {
  *bell = std::exp(-0.5 * t * t);
  return 0.5 * std::erfc(t * 0.70710678118654752440);
}

template <class A> PFM_INLINE Jet<A> logistic(A x) {
  const Decay<A> d = decay(at_most(magnitude(x), Limits<A>::decay));
  const A large = inverse(A(2) + d.less_one), small = d.e * large;  // of |x| and of -|x|; their sum is 1
  const A slope = small * large;
  return {x < A(0) ? small : large, slope, with_sign_of((A(0) - d.less_one) * large, x) * -slope};
}

template <ActivationKind kind, class A> PFM_INLINE Jet<A> jet(A x) {
  if constexpr (kind == ActivationKind::sigmoid) {
    return logistic(x);
  } else if constexpr (kind == ActivationKind::tanh) {
    const Decay<A> d = decay(at_most(A(2) * magnitude(x), Limits<A>::decay));
    const A scale = inverse(A(2) + d.less_one), f = with_sign_of((A(0) - d.less_one) * scale, x);
    const A slope = A(4) * d.e * scale * scale;
    return {f, slope, A(-2) * f * slope};
  } else if constexpr (kind == ActivationKind::relu) {
    return {x < A(0) ? A(0) : x, x <= A(0) ? A(0) : A(1), A(0)};
  } else if constexpr (kind == ActivationKind::silu) {
    constexpr A limit = Limits<A>::decay;
    const Jet<A> s = logistic(x);
    const A low = at_least(x, -limit), near = at_most(low, limit);
    return {low * s.f, s.f + near * s.d1, A(2) * s.d1 + near * s.d2};
  } else if constexpr (kind == ActivationKind::gelu_tanh) {  // x times the sigmoid of w(x)
    constexpr A limit = Limits<A>::gelu_tanh, c1 = A(1.59576912160573071176), c3 = c1 * A(0.044715);
    const A low = at_least(x, -limit), near = at_most(low, limit), square = near * near;
    const A w1 = c1 + A(3) * c3 * square, w2 = A(6) * c3 * near;
    const Jet<A> s = logistic(near * (c1 + c3 * square));
    return {low * s.f, s.f + near * (s.d1 * w1), A(2) * (s.d1 * w1) + near * (s.d2 * (w1 * w1) + s.d1 * w2)};
  } else {
    constexpr A limit = Limits<A>::gelu;
    A bell;
    const A low = at_least(x, -limit), near = at_most(low, limit);
    const A tail = upper_tail(magnitude(near), &bell);
    const A below = x < A(0) ? tail : A(1) - tail, density = bell * A(0.39894228040143267794);
    return {low * below, below + near * density, density * (A(2) - near * near)};
  }
}

// slope * g; what relu cuts off is 0 whatever g is.
template <class A> PFM_INLINE A times(A slope, A g, bool cuts) { return cuts && slope == A(0) ? A(0) : slope * g; }

// ---- one element of a call ------------------------------------------------------------------------------------------

template <class A> struct Element { A a, b, da, db, gy, gdy; };
template <class A> struct Results { A v[4]; };  // y, dy; or ga, gb, gda, gdb

template <bool gated, class A> PFM_INLINE Results<A> forward_of(const Jet<A>& j, const Element<A>& x, bool cuts) {
  if constexpr (!gated) return {{j.f, times(j.d1, x.da, cuts), A(0), A(0)}};
  return {{j.f * x.b, times(j.d1, x.b * x.da, cuts) + j.f * x.db, A(0), A(0)}};
}

// both: through the tangent as well.
template <bool gated, bool both, class A>
PFM_INLINE Results<A> backward_of(const Jet<A>& j, const Element<A>& x, bool cuts) {
  if constexpr (!gated) {
    const A ga = times(j.d1, x.gy, cuts);
    if constexpr (!both) return {{ga, A(0), A(0), A(0)}};
    return {{ga + times(j.d2, x.da * x.gdy, cuts), A(0), times(j.d1, x.gdy, cuts), A(0)}};
  } else {
    if constexpr (!both) return {{times(j.d1, x.b * x.gy, cuts), j.f * x.gy, A(0), A(0)}};
    const A change = x.b * x.gy + x.db * x.gdy;
    return {{times(j.d1, change, cuts) + times(j.d2, x.b * x.da * x.gdy, cuts),
             j.f * x.gy + times(j.d1, x.da * x.gdy, cuts), times(j.d1, x.b * x.gdy, cuts), j.f * x.gdy}};
  }
}

}  // namespace pyflowmap
