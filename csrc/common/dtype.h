// dtype.h - storage types of a tensor and their exact conversion to and from the arithmetic types float and double.
//
// Half and bfloat16 are converted by integer arithmetic without branches: the same bits on every instruction set,
// on the device and in the emulator, and loops over them vectorise everywhere.
#pragma once
#include <cstdint>
#include <cstring>

// Functions of the common headers are compiled once per instruction set (see combine_isa.cpp). They are forced inline
// and have internal linkage, so that the linker can never hand an AVX-512 copy to a machine without it.
#if defined(__CUDACC__)
#define PFM_INLINE static __host__ __device__ __forceinline__
#else
#define PFM_INLINE static inline __attribute__((always_inline))
#endif

namespace pyflowmap {

enum class DType : uint8_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

PFM_INLINE int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

PFM_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

PFM_INLINE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

PFM_INLINE float to_float(float x) { return x; }
PFM_INLINE float to_float(double x) { return static_cast<float>(x); }
PFM_INLINE float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

PFM_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Exponent and mantissa moved in place, then 2^112 corrects the bias: exact, subnormals included.
  const float finite = float_of(magnitude) * 5.192296858534828e33f;
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their payload
  const uint32_t value = magnitude >= 0x0f800000u ? special : bits_of(finite);
  return float_of(value | sign);
}

PFM_INLINE void store(float* to, float x) { *to = x; }
PFM_INLINE void store(double* to, double x) { *to = x; }

// Round to nearest even; a NaN stays a (quiet) NaN.
PFM_INLINE void store(bf16* to, float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  to->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

PFM_INLINE void store(f16* to, float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Normal halves: round the 13 dropped bits to nearest even, then move the exponent bias from 127 to 15.
  const uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
  // Subnormal halves (below 2^-14): adding 0.5 aligns the value so that the float unit rounds it to nearest even.
  const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  uint32_t half = a < 0x38800000u ? subnormal : normal;
  half = a >= 0x477ff000u ? 0x7c00u : half;                          // 65520 and above round to infinity
  half = a > 0x7f800000u ? (0x7e00u | ((a >> 13) & 0x3ffu)) : half;  // NaN
  to->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace pyflowmap
