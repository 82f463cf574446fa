// tensor_core.h - ldmatrix and mma.sync.m16n8k16 (compute capability 8.0), f16 or bf16 in, f32 out.
//
//   mma<Half>(d, a, b, c)        d = a b + c; fragments as in the PTX manual (spelled out in simt/matrix.h)
//   load_matrix<N>(out, row)     N in {1, 2, 4} 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of
//   load_matrix_transposed<N>    matrix i / 8, in shared memory, 16-byte aligned
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/launch.h"

namespace pyflowmap {

#if defined(PYFLOWMAP_SIMT)

template <class T> struct MatrixHalf;
template <> struct MatrixHalf<f16> { static constexpr simt::Half value = simt::Half::f16; };
template <> struct MatrixHalf<bf16> { static constexpr simt::Half value = simt::Half::bf16; };

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], SIMT_SITE) {
  simt::warp_mma(MatrixHalf<T>::value, d, a, b, c, file, line);
}
template <int N> inline void load_matrix(uint32_t (&out)[N], const void* row, SIMT_SITE) {
  simt::load_matrix<N>(out, row, false, file, line);
}
template <int N> inline void load_matrix_transposed(uint32_t (&out)[N], const void* row, SIMT_SITE) {
  simt::load_matrix<N>(out, row, true, file, line);
}

#elif defined(__CUDACC__)

#define PFM_MMA(type)                                                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                               \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                                                       \
               "{%10,%11,%12,%13};"                                                                                 \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                 "f"(c[3]))

template <class T>
static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                           const float (&c)[4]) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "mma takes bf16 or f16");
  if constexpr (std::is_same<T, bf16>::value) PFM_MMA("bf16");
  else PFM_MMA("f16");
}
#undef PFM_MMA

#define PFM_LOAD_MATRIX(name, transpose)                                                              \
  template <int N> static __device__ __forceinline__ void name(uint32_t (&out)[N], const void* row) { \
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");                   \
    const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));                       \
    if constexpr (N == 1) {                                                                           \
      asm volatile("ldmatrix.sync.aligned.m8n8.x1" transpose ".shared.b16 {%0}, [%1];"                \
                   : "=r"(out[0])                                                                     \
                   : "r"(from)                                                                        \
                   : "memory");                                                                       \
    } else if constexpr (N == 2) {                                                                    \
      asm volatile("ldmatrix.sync.aligned.m8n8.x2" transpose ".shared.b16 {%0,%1}, [%2];"             \
                   : "=r"(out[0]), "=r"(out[1])                                                       \
                   : "r"(from)                                                                        \
                   : "memory");                                                                       \
    } else {                                                                                          \
      asm volatile("ldmatrix.sync.aligned.m8n8.x4" transpose ".shared.b16 {%0,%1,%2,%3}, [%4];"       \
                   : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])                           \
                   : "r"(from)                                                                        \
                   : "memory");                                                                       \
    }                                                                                                 \
  }
PFM_LOAD_MATRIX(load_matrix, "")
PFM_LOAD_MATRIX(load_matrix_transposed, ".trans")
#undef PFM_LOAD_MATRIX

#endif

}  // namespace pyflowmap
