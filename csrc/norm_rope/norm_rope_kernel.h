// norm_rope_kernel.h - the kernels of norm_rope.cu.
//
// A row is two runs of columns that turn into each other; a lane holds the same columns of both, so that a rotation needs
// no other lane. 1, 2, 4, ... 32 lanes take a row, a warp as many rows as fit: 4 rows of 64 columns. Rows of more columns
// than a warp holds are read twice, the second time from the cache.
#pragma once
#include "common/column_sums_device.h"
#include "norm_rope/norm_rope.h"

namespace pyflowmap {
namespace norm_rope_device {
namespace {

using namespace row_device;

constexpr int kForwardWarps = 4, kBackwardWarps = 4;  // of a block: registers are handed out in smaller pieces

struct Common {
  RowShape shape;
  int64_t rows;
  float eps, per;   // per: 1 / columns
  int first, half;  // columns of the first run, and where the second begins
  int group;        // lanes of a row: a power of 2
  DeviceRows x, dx, weight, dweight, cos, sin;
};

struct ForwardArguments : Common { DeviceRows y, dy; };

struct BackwardArguments : Common {
  DeviceRows gy, gdy, gx, gdx;
  DeviceRows sum[2];  // gweight, gdweight
  ColumnSums sums;
  float* partials;
};

// ---- the columns of a lane, in both runs --------------------------------------------------------------------------------

template <int Width> struct Bits { uint32_t run[2][4]; };
template <int Width> struct Values { float run[2][Width]; };

template <int Width>
static __device__ __forceinline__ void fetch_both(Bits<Width>& bits, const DeviceRows& x, int64_t start, int column,
                                                  const Common& p) {
  fetch<Width>(bits.run[0], x, start, column, p.first);
  fetch<Width>(bits.run[1], x, start, p.half + column, p.shape.columns);
}

template <int Width>
static __device__ __forceinline__ void widen_both(Values<Width>& to, const Bits<Width>& bits, const DeviceRows& x) {
  UNROLL
  for (int h = 0; h < 2; ++h) widen<Width>(to.run[h], bits.run[h], x.dtype);
}

template <int Width>
static __device__ __forceinline__ void put_both(const DeviceRows& y, int64_t start, int column, const Common& p,
                                                const Values<Width>& from) {
  put<Width>(y, start, column, p.first, from.run[0]);
  put<Width>(y, start, p.half + column, p.shape.columns, from.run[1]);
}

// Width columns of any type, four at a time; 0 past the end.
template <int Width>
static __device__ __forceinline__ void read_wide(float (&to)[Width], const DeviceRows& x, int64_t start, int64_t column,
                                                 int64_t columns) {
  UNROLL
  for (int i = 0; i < Width; i += 4) {
    uint32_t bits[4];
    float four[4];
    fetch<4>(bits, x, start, column + i, columns);
    widen<4>(four, bits, x.dtype);
    UNROLL
    for (int k = 0; k < 4; ++k) to[i + k] = four[k];
  }
}

template <int Width>
static __device__ __forceinline__ void read_vector(Values<Width>& to, const DeviceRows& x, int column,
                                                   const Common& p) {
  read_wide<Width>(to.run[0], x, 0, column, p.first);
  read_wide<Width>(to.run[1], x, 0, p.half + column, p.shape.columns);
}

// Turns by the angles of a row, or back; nothing without angles.
template <int Width, bool Back> struct Rotation {
  float cos[Width] = {}, sin[Width] = {};

  __device__ __forceinline__ void read(const Common& p, const RowIndex& at, int column) {
    if (!p.cos.data) return;
    read_wide<Width>(cos, p.cos, start_of(p.cos, at), column, p.first);
    read_wide<Width>(sin, p.sin, start_of(p.sin, at), column, p.first);
  }
  __device__ __forceinline__ void turn(const Common& p, Values<Width>& v) const {
    if (!p.cos.data) return;
    UNROLL
    for (int i = 0; i < Width; ++i) {
      const float a = v.run[0][i], b = v.run[1][i], s = Back ? -sin[i] : sin[i];
      v.run[0][i] = cos[i] * a - s * b;
      v.run[1][i] = cos[i] * b + s * a;
    }
  }
};

template <int N> static __device__ __forceinline__ void group_sums(float (&sums)[N], int group) {
  for (int m = group / 2; m > 0; m >>= 1) {
    UNROLL
    for (int i = 0; i < N; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], m);
  }
}

// ---- forward ------------------------------------------------------------------------------------------------------------

// Width   columns per access: 4, or 8 where x, dx, y and dy are 16 bits wide
// Pair    whether dy is asked for
// Held    whether a warp holds a row
template <int Width, bool Pair, bool Held>
__global__ void __launch_bounds__(32 * kForwardWarps, Pair ? 3 : 4)
    norm_rope_kernel(const __grid_constant__ ForwardArguments p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int mine = lane % p.group * Width, step = p.group * Width, rows_per_warp = 32 / p.group;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kForwardWarps;
  Values<Width> w = {}, dw = {}, x = {}, dx = {};
  if (Held) {
    read_vector(w, p.weight, mine, p);
    if (Pair) read_vector(dw, p.dweight, mine, p);
  }
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kForwardWarps + warp) * rows_per_warp; first < p.rows;
       first += warps * rows_per_warp) {
    const int64_t row = first + lane / p.group;
    const bool active = row < p.rows;
    const RowIndex at = index_of(p.shape, active ? row : 0);
    const int64_t x_at = start_of(p.x, at), dx_at = start_of(p.dx, at);
    const int end = active ? p.half : 0;  // of the columns of this lane
    float sums[2] = {};
    for (int c = mine; c < end; c += step) {
      Bits<Width> bits, d_bits;
      fetch_both(bits, p.x, x_at, c, p);
      if (Pair) fetch_both(d_bits, p.dx, dx_at, c, p);
      widen_both(x, bits, p.x);
      if (Pair) widen_both(dx, d_bits, p.dx);
      UNROLL
      for (int i = 0; i < 2 * Width; ++i) {
        const float v = x.run[i / Width][i % Width];
        sums[0] += v * v;
        if (Pair) sums[1] += v * dx.run[i / Width][i % Width];
      }
      if (Held) break;
    }
    group_sums(sums, p.group);
    const float r = rsqrtf(sums[0] * p.per + p.eps), u = r * (r * (sums[1] * p.per));
    for (int c = mine; c < end; c += step) {
      if (!Held) {
        Bits<Width> bits, d_bits;
        fetch_both(bits, p.x, x_at, c, p);
        if (Pair) fetch_both(d_bits, p.dx, dx_at, c, p);
        read_vector(w, p.weight, c, p);
        if (Pair) read_vector(dw, p.dweight, c, p);
        widen_both(x, bits, p.x);
        if (Pair) widen_both(dx, d_bits, p.dx);
      }
      Rotation<Width, false> rotation;
      rotation.read(p, at, c);
      Values<Width> y, dy = {};
      UNROLL
      for (int i = 0; i < 2 * Width; ++i) {
        const int h = i / Width, k = i % Width;
        const float m = r * x.run[h][k];
        y.run[h][k] = w.run[h][k] * m;
        if (Pair) dy.run[h][k] = dw.run[h][k] * m + w.run[h][k] * (r * dx.run[h][k] - u * m);
      }
      rotation.turn(p, y);
      put_both(p.y, start_of(p.y, at), c, p, y);
      if (Pair) {
        rotation.turn(p, dy);
        put_both(p.dy, start_of(p.dy, at), c, p, dy);
      }
      if (Held) break;
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------------

// What a lane reads of a row.
template <int Width, bool Pair> struct Inputs {
  Values<Width> x, z, dx, zd;

  __device__ __forceinline__ void read(const BackwardArguments& p, const RowIndex& at, int c) {
    Bits<Width> bits[4];
    fetch_both(bits[0], p.x, start_of(p.x, at), c, p);
    fetch_both(bits[1], p.gy, start_of(p.gy, at), c, p);
    if (Pair) {
      fetch_both(bits[2], p.dx, start_of(p.dx, at), c, p);
      fetch_both(bits[3], p.gdy, start_of(p.gdy, at), c, p);
    }
    Rotation<Width, true> rotation;
    rotation.read(p, at, c);
    widen_both(x, bits[0], p.x);
    widen_both(z, bits[1], p.gy);
    rotation.turn(p, z);
    if (Pair) {
      widen_both(dx, bits[2], p.dx);
      widen_both(zd, bits[3], p.gdy);
      rotation.turn(p, zd);
    }
  }
};

// A lane's numbers into the partials of a chunk (added to those there, if `more`), or into a result that is no sum.
template <int Width>
static __device__ __forceinline__ void put_partial(const BackwardArguments& p, int which, int64_t chunk, int column,
                                                   bool more, const Values<Width>& from) {
  if (!p.sum[which].data) return;
  const int slot = p.sums.slot[which];
  float* const to = slot < 0 ? nullptr : p.partials + (chunk * p.sums.slots + slot) * p.shape.columns;
  UNROLL
  for (int i = 0; i < 2 * Width; ++i) {
    const int h = i / Width, c = column + i % Width, at = h * p.half + c;
    if (h == 0 ? c >= p.first : at >= p.shape.columns) continue;
    const float value = from.run[h][i % Width];
    if (slot < 0) put_one(p.sum[which], at, value);
    else to[at] = more ? to[at] + value : value;
  }
}

// A block takes a chunk of rows. Where a warp holds a row, a lane keeps its columns' share of the weight's gradient in
// registers over the chunk; otherwise the block is one warp and keeps it in the partials.
template <int Width, bool Pair, bool Held>
__global__ void __launch_bounds__(Held ? 32 * kBackwardWarps : 32, Held ? 3 : 8)
    norm_rope_backward_kernel(const __grid_constant__ BackwardArguments p) {
  constexpr int kVectors = Pair ? 2 : 1, kWarps = Held ? kBackwardWarps : 1, kValues = 2 * Width;
  SHARED(float, parts, (Held ? kWarps * kVectors * kValues * 32 : 1));
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int mine = lane % p.group * Width, step = p.group * Width, rows_per_warp = 32 / p.group;
  Values<Width> w = {}, dw = {};
  Inputs<Width, Pair> in = {};
  if (Held) {
    read_vector(w, p.weight, mine, p);
    if (Pair) read_vector(dw, p.dweight, mine, p);
  }
  for (int64_t chunk = blockIdx.x; chunk < p.sums.chunks; chunk += gridDim.x) {
    const RowRange range = rows_of_chunk(p.sums, chunk);
    Values<Width> g[kVectors] = {};
    for (int64_t first = range.first + warp * rows_per_warp; first < range.last; first += kWarps * rows_per_warp) {
      const int64_t row = first + lane / p.group;
      const bool active = row < range.last;
      const RowIndex at = index_of(p.shape, active ? row : range.first);
      const int end = active ? p.half : 0;
      float sums[5] = {};
      for (int c = mine; c < end; c += step) {
        if (!Held) {
          read_vector(w, p.weight, c, p);
          if (Pair) read_vector(dw, p.dweight, c, p);
        }
        in.read(p, at, c);
        UNROLL
        for (int i = 0; i < kValues; ++i) {
          const int h = i / Width, k = i % Width;
          const float v = in.x.run[h][k];
          float gn = w.run[h][k] * in.z.run[h][k];
          sums[0] += v * v;
          if (Pair) {
            const float a = w.run[h][k] * in.zd.run[h][k];
            gn += dw.run[h][k] * in.zd.run[h][k];
            sums[2] += v * in.dx.run[h][k];
            sums[3] += v * a;
            sums[4] += a * in.dx.run[h][k];
          }
          sums[1] += v * gn;
        }
        if (Held) break;
      }
      if (Pair) group_sums(sums, p.group);
      else group_sums(reinterpret_cast<float (&)[2]>(sums), p.group);
      const float r = rsqrtf(sums[0] * p.per + p.eps), mean = r * (sums[1] * p.per);
      const float u = r * (r * (sums[2] * p.per)), q = r * (sums[3] * p.per);
      const float along = Pair ? 3.0f * q * u - r * (sums[4] * p.per) - mean : -mean;
      for (int c = mine; c < end; c += step) {
        if (!Held) {
          read_vector(w, p.weight, c, p);
          if (Pair) read_vector(dw, p.dweight, c, p);
          in.read(p, at, c);
        }
        Values<Width> gx, gdx = {}, now[kVectors];
        UNROLL
        for (int i = 0; i < kValues; ++i) {
          const int h = i / Width, k = i % Width;
          const float m = r * in.x.run[h][k], z = in.z.run[h][k];
          if (Pair) {
            const float e = r * in.dx.run[h][k], zd = in.zd.run[h][k], a = w.run[h][k] * zd;
            gx.run[h][k] = r * (w.run[h][k] * z + dw.run[h][k] * zd + m * along - a * u - e * q);
            gdx.run[h][k] = r * (a - m * q);
            now[0].run[h][k] = z * m + zd * (e - u * m);
            now[kVectors - 1].run[h][k] = zd * m;
          } else {
            gx.run[h][k] = r * (w.run[h][k] * z + m * along);
            now[0].run[h][k] = z * m;
          }
        }
        put_both(p.gx, start_of(p.gx, at), c, p, gx);
        if (Pair) put_both(p.gdx, start_of(p.gdx, at), c, p, gdx);
        UNROLL
        for (int v = 0; v < kVectors; ++v) {
          if (!Held) put_partial(p, v, chunk, c, first > range.first, now[v]);
          UNROLL
          for (int i = 0; i < kValues; ++i) g[v].run[i / Width][i % Width] += now[v].run[i / Width][i % Width];
        }
        if (Held) break;
      }
    }
    if constexpr (Held) {
      // The chunk's sums: over the rows of a warp by a tree, then over the warps in their order.
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        UNROLL
        for (int i = 0; i < kValues; ++i) {
          float sum = g[v].run[i / Width][i % Width];
          for (int m = p.group; m < 32; m <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
          parts[((warp * kVectors + v) * kValues + i) * 32 + lane] = sum;
        }
      }
      __syncthreads();
      if (warp == 0 && lane < p.group) {
        UNROLL
        for (int v = 0; v < kVectors; ++v) {
          Values<Width> total = {};
          UNROLL
          for (int i = 0; i < kValues; ++i) {
            for (int from = 0; from < kWarps; ++from) {
              total.run[i / Width][i % Width] += parts[((from * kVectors + v) * kValues + i) * 32 + lane];
            }
          }
          put_partial(p, v, chunk, mine, false, total);
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace norm_rope_device
}  // namespace pyflowmap
