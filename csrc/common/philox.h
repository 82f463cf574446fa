// philox.h - the normal number of (seed, sample, stream, element): the same bits on every back end and instruction set.
//
//   block  = Philox4x32-10(key = seed, counter = (element / 4, sample low, sample high, stream))
//   normal = Box-Muller of words (0, 1) for element % 4 in {0, 1}, of words (2, 3) for {2, 3}
//
// Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), multipliers and Weyl constants
// from its table. Box-Muller: radius sqrt(-2 ln u) with u = (w0 >> 1) 2^-31 + 2^-32 in [2^-32, 1], so |normal| <= 6.67;
// the angle is w1 / 2^32 turns, cut into quadrants by integer arithmetic. Logarithm, sine and cosine are short
// polynomials (own minimax fits, float32 error below 2e-7) made of separately rounded multiplications and additions:
// a fused multiply-add would change the last bit, so the host compiles with -ffp-contract=off and the device uses the
// _rn intrinsics.
#pragma once
#include "common/dtype.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace pyflowmap {

#if defined(__CUDA_ARCH__)
PFM_INLINE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
PFM_INLINE float add_rn(float a, float b) { return __fadd_rn(a, b); }
PFM_INLINE float sqrt_rn(float a) { return __fsqrt_rn(a); }
PFM_INLINE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
PFM_INLINE double add_rn(double a, double b) { return __dadd_rn(a, b); }
#else
PFM_INLINE float mul_rn(float a, float b) { return a * b; }
PFM_INLINE float add_rn(float a, float b) { return a + b; }
PFM_INLINE float sqrt_rn(float a) { return __builtin_sqrtf(a); }
PFM_INLINE double mul_rn(double a, double b) { return a * b; }
PFM_INLINE double add_rn(double a, double b) { return a + b; }
#endif

struct Words { uint32_t w[4]; };

PFM_INLINE Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// -2 ln u for u in [2^-32, 1].
PFM_INLINE float minus_two_log(float u) {
  // u = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = f - f^2/2 + f^3 P(f), f = m - 1 exactly.
  const uint32_t shifted = bits_of(u) + (0x3f800000u - 0x3f3504f3u);
  const float e = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
  const float f = add_rn(float_of((shifted & 0x007fffffu) + 0x3f3504f3u), -1.0f);
  float p = 6.746552140e-02f;
  p = add_rn(mul_rn(p, f), -1.167562827e-01f);
  p = add_rn(mul_rn(p, f), 1.188819036e-01f);
  p = add_rn(mul_rn(p, f), -1.240559444e-01f);
  p = add_rn(mul_rn(p, f), 1.421954930e-01f);
  p = add_rn(mul_rn(p, f), -1.666799486e-01f);
  p = add_rn(mul_rn(p, f), 2.000211924e-01f);
  p = add_rn(mul_rn(p, f), -2.500000894e-01f);
  p = add_rn(mul_rn(p, f), 3.333331347e-01f);
  const float ff = mul_rn(f, f);
  float log = add_rn(mul_rn(mul_rn(ff, f), p), mul_rn(e, 1.428606765e-06f));  // ln 2 = high (15 bits) + low
  log = add_rn(log, mul_rn(ff, -0.5f));
  log = add_rn(log, f);
  log = add_rn(log, mul_rn(e, 6.931457520e-01f));
  // The polynomial may end one ulp above zero at u = 1.
  const float result = mul_rn(log, -2.0f);
  return result > 0.0f ? result : 0.0f;
}

// One Box-Muller pair from two words.
PFM_INLINE void normal_pair(uint32_t w0, uint32_t w1, float* first, float* second) {
  const float u = add_rn(mul_rn(static_cast<float>(static_cast<int32_t>(w0 >> 1)), 4.656612873e-10f), 2.328306437e-10f);
  const float radius = sqrt_rn(minus_two_log(u));
  const uint32_t quadrant = (w1 + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(w1 - (quadrant << 30));      // [-2^29, 2^29)
  const float phi = mul_rn(static_cast<float>(rest), 1.462918120e-09f);  // [-pi/4, pi/4)
  const float z = mul_rn(phi, phi);
  float s = add_rn(mul_rn(-1.951729646e-04f, z), 8.332177997e-03f);
  s = add_rn(mul_rn(s, z), -1.666665524e-01f);
  s = add_rn(mul_rn(mul_rn(s, z), phi), phi);
  float c = add_rn(mul_rn(2.443844824e-05f, z), -1.388736768e-03f);
  c = add_rn(mul_rn(c, z), 4.166664556e-02f);
  c = add_rn(mul_rn(mul_rn(c, z), z), add_rn(mul_rn(z, -0.5f), 1.0f));
  // Quadrants 0..3: (c, s), (-s, c), (-c, -s), (s, -c).
  const uint32_t swap = 0u - (quadrant & 1u);
  const uint32_t cos_bits = (bits_of(s) & swap) | (bits_of(c) & ~swap);
  const uint32_t sin_bits = (bits_of(c) & swap) | (bits_of(s) & ~swap);
  const uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30;
  const uint32_t sin_sign = (quadrant & 2u) << 30;
  *first = mul_rn(radius, float_of(cos_bits ^ cos_sign));
  *second = mul_rn(radius, float_of(sin_bits ^ sin_sign));
}

// The four normals of elements 4 * block ... 4 * block + 3.
PFM_INLINE void normals_of_block(uint64_t seed, uint64_t sample, uint32_t stream, uint32_t block, float normal[4]) {
  const Words words = philox(block, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32), stream,
                             static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  normal_pair(words.w[0], words.w[1], &normal[0], &normal[1]);
  normal_pair(words.w[2], words.w[3], &normal[2], &normal[3]);
}

}  // namespace pyflowmap
