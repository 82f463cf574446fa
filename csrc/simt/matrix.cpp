// matrix.cpp - ldmatrix and mma.sync as warp collectives (fragment layouts: matrix.h).
#include "simt/matrix.h"

#include "common/dtype.h"
#include "simt/block.h"

namespace simt {

namespace {

double widened(Half kind, std::uint16_t bits) {
  if (kind == Half::bf16) return pyflowmap::to_float(pyflowmap::bf16{bits});
  return pyflowmap::to_float(pyflowmap::f16{bits});
}

// The element of a register that holds columns (or rows) 2t and 2t+1.
std::uint16_t part(std::uint32_t word, int which) { return static_cast<std::uint16_t>(which ? word >> 16 : word); }

struct MmaCall {
  Half kind;
  float* d;
  const std::uint32_t *a, *b;
  const float* c;
};

void complete_mma(void* const (&lanes)[32], unsigned, unsigned char) {
  double a[16][16], b[16][8];
  float d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaCall& call = *static_cast<MmaCall*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = widened(call.kind, part(call.a[i], e));
      for (int i = 0; i < 2; ++i) b[2 * t + e + 8 * i][g] = widened(call.kind, part(call.b[i], e));
      for (int i = 0; i < 2; ++i) d[g + 8 * i][2 * t + e] = call.c[2 * i + e];
    }
  }
  // The device's order and width of accumulation are not documented: one rounding here, tolerances in the tests.
  for (auto& row : d) {
    const auto m = &row - &d[0];
    for (int n = 0; n < 8; ++n) {
      double sum = static_cast<double>(row[n]);
      for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][n];
      row[n] = static_cast<float>(sum);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const out = static_cast<MmaCall*>(lanes[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 2; ++e) out[2 * i + e] = d[g + 8 * i][2 * t + e];
    }
  }
}

struct LoadCall {
  int matrices;
  bool transpose;
  const std::uint32_t* row;
  std::uint32_t* out;
};

void complete_load(void* const (&lanes)[32], unsigned, unsigned char) {
  for (int lane = 0; lane < 32; ++lane) {
    const LoadCall& call = *static_cast<LoadCall*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < call.matrices; ++m) {
      const auto element = [&](int row, int column) {
        const LoadCall& source = *static_cast<LoadCall*>(lanes[8 * m + row]);
        return part(source.row[column / 2], column % 2);
      };
      const std::uint32_t low = call.transpose ? element(2 * t, g) : element(g, 2 * t);
      const std::uint32_t high = call.transpose ? element(2 * t + 1, g) : element(g, 2 * t + 1);
      call.out[m] = low | high << 16;
    }
  }
}

void require_full_warp(Block& block, const char* file, int line) {
  if (block.live_lanes() != 0xffffffffu) block.fail("a matrix operation needs all 32 lanes of the warp", file, line);
}

}  // namespace

void warp_mma(Half kind, float* d, const std::uint32_t* a, const std::uint32_t* b, const float* c, const char* file,
              int line) {
  Block& block = *Block::current();
  require_full_warp(block, file, line);
  MmaCall call{kind, d, a, b, c};
  block.wait_for_warp("mma.sync", 0xffffffffu, complete_mma, &call, false, file, line);
}

void warp_load_matrix(int matrices, bool transpose, const std::uint32_t (&row)[4], std::uint32_t* out, const char* file,
                      int line) {
  Block& block = *Block::current();
  require_full_warp(block, file, line);
  LoadCall call{matrices, transpose, row, out};
  block.wait_for_warp("ldmatrix", 0xffffffffu, complete_load, &call, false, file, line);
}

}  // namespace simt
