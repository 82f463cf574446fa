// matrix.h - ldmatrix and mma.sync.m16n8k16 on fragments laid out as in the PTX manual.
//
// With g = lane / 4 and t = lane % 4, lower column in the lower half of a register:
//   A (16x16) a0: (g, 2t..), a1: (g+8, 2t..), a2: (g, 2t+8..), a3: (g+8, 2t+8..)
//   B (16x8)  b0: (2t.., g), b1: (2t+8.., g)
//   C (16x8)  c0, c1: (g, 2t..), c2, c3: (g+8, 2t..)
#pragma once
#include <cstdint>
#include <cstring>

#include "simt/sync.h"
#include "simt/types.h"

namespace simt {

enum class Half { f16, bf16 };

void warp_mma(Half kind, float* d, const std::uint32_t* a, const std::uint32_t* b, const float* c, const char* file,
              int line);
// rows[i] is lane i's 16-byte row of matrix i / 8, already read.
void warp_load_matrix(int matrices, bool transpose, const std::uint32_t (&row)[4], std::uint32_t* out, const char* file,
                      int line);
void fail(const char* what, const char* file, int line);

template <int Matrices> inline void load_matrix(std::uint32_t* out, const void* row, bool transpose, SIMT_SITE) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4, "ldmatrix loads 1, 2 or 4 matrices");
  std::uint32_t words[4] = {};
  const unsigned lane =
      (here.thread.x + here.block_extent.x * (here.thread.y + here.block_extent.y * here.thread.z)) % 32;
  if (lane < 8 * Matrices) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16)
      fail("ldmatrix: the row address is not 16-byte aligned", file, line);
    const auto* from = static_cast<const std::uint32_t*>(row);
    for (int i = 0; i < 4; ++i) words[i] = from[i];
  }
  warp_load_matrix(Matrices, transpose, words, out, file, line);
}

}  // namespace simt
