// normals.h - many normal numbers at once on the CPU: philox.h over runs of consecutive elements, vectorised.
//
// The ten Philox rounds keep each 32-bit word in a 64-bit lane: the 32 x 32 -> 64 bit multiplication is then one
// instruction and the low half needs no masking, because the multiplier and the final narrowing ignore the high half.
#pragma once
#include "common/philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyflowmap {

inline constexpr int kNormalRun = 256;  // elements drawn per call of normal_run

#if defined(__AVX512F__)
using Lane64 = __m512i;
inline constexpr int kLanes64 = 8;
PFM_INLINE Lane64 lanes(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
PFM_INLINE Lane64 count_from(uint64_t x) {
  return _mm512_add_epi64(lanes(x), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
PFM_INLINE Lane64 multiply(Lane64 a, Lane64 b) { return _mm512_mul_epu32(a, b); }
PFM_INLINE Lane64 high(Lane64 a) { return _mm512_srli_epi64(a, 32); }
PFM_INLINE Lane64 xor3(Lane64 a, Lane64 b, Lane64 c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
PFM_INLINE void narrow(uint32_t* to, Lane64 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(a));
}
#elif defined(__AVX2__)
using Lane64 = __m256i;
inline constexpr int kLanes64 = 4;
PFM_INLINE Lane64 lanes(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
PFM_INLINE Lane64 count_from(uint64_t x) { return _mm256_add_epi64(lanes(x), _mm256_set_epi64x(3, 2, 1, 0)); }
PFM_INLINE Lane64 multiply(Lane64 a, Lane64 b) { return _mm256_mul_epu32(a, b); }
PFM_INLINE Lane64 high(Lane64 a) { return _mm256_srli_epi64(a, 32); }
PFM_INLINE Lane64 xor3(Lane64 a, Lane64 b, Lane64 c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
PFM_INLINE void narrow(uint32_t* to, Lane64 a) {
  const __m256i packed = _mm256_permutevar8x32_epi32(a, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#else
using Lane64 = uint64_t;
inline constexpr int kLanes64 = 1;
PFM_INLINE Lane64 lanes(uint64_t x) { return x; }
PFM_INLINE Lane64 count_from(uint64_t x) { return x; }
PFM_INLINE Lane64 multiply(Lane64 a, Lane64 b) { return (a & 0xffffffffu) * b; }
PFM_INLINE Lane64 high(Lane64 a) { return a >> 32; }
PFM_INLINE Lane64 xor3(Lane64 a, Lane64 b, Lane64 c) { return a ^ b ^ c; }
PFM_INLINE void narrow(uint32_t* to, Lane64 a) { *to = static_cast<uint32_t>(a); }
#endif

// The kNormalRun normals of elements 4 * block ... of one (seed, sample, stream).
PFM_INLINE void normal_run(uint64_t seed, uint64_t sample, uint32_t stream, uint32_t block, float* to) {
  constexpr int kBlocks = kNormalRun / 4;
  constexpr int kUnroll = 4;  // independent chains, to cover the latency of the multiplier
  alignas(64) uint32_t words[4][kBlocks];
  alignas(64) float normal[4][kBlocks];
  for (int i = 0; i < kBlocks; i += kLanes64 * kUnroll) {
    Lane64 c0[kUnroll], c1[kUnroll], c2[kUnroll], c3[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      c0[u] = count_from(static_cast<uint64_t>(block) + static_cast<uint64_t>(i + u * kLanes64));
      c1[u] = lanes(static_cast<uint32_t>(sample));
      c2[u] = lanes(sample >> 32);
      c3[u] = lanes(stream);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int u = 0; u < kUnroll; ++u) {
        const Lane64 p0 = multiply(c0[u], lanes(0xD2511F53u)), p1 = multiply(c2[u], lanes(0xCD9E8D57u));
        c0[u] = xor3(high(p1), c1[u], lanes(k0));
        c2[u] = xor3(high(p0), c3[u], lanes(k1));
        c1[u] = p1;
        c3[u] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int u = 0; u < kUnroll; ++u) {
      narrow(words[0] + i + u * kLanes64, c0[u]);
      narrow(words[1] + i + u * kLanes64, c1[u]);
      narrow(words[2] + i + u * kLanes64, c2[u]);
      narrow(words[3] + i + u * kLanes64, c3[u]);
    }
  }
  for (int i = 0; i < kBlocks; ++i) normal_pair(words[0][i], words[1][i], &normal[0][i], &normal[1][i]);
  for (int i = 0; i < kBlocks; ++i) normal_pair(words[2][i], words[3][i], &normal[2][i], &normal[3][i]);
  for (int i = 0; i < kBlocks; ++i) {
    for (int k = 0; k < 4; ++k) to[4 * i + k] = normal[k][i];
  }
}

}  // namespace pyflowmap
