// correct.cu - what the emulator computes, against tables and closed forms.
#include <cmath>

#include "harness.h"

using namespace pyflowmap;

// ---- reductions and grids -------------------------------------------------------------------------------------------

__global__ void row_sums(const float* in, float* out, int columns) {
  SHARED(float, partial, 32);
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < columns; i += static_cast<int>(blockDim.x)) {
    sum += in[static_cast<size_t>(blockIdx.x) * static_cast<size_t>(columns) + static_cast<size_t>(i)];
  }
  for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += partial[w];
    out[blockIdx.x] = total;
  }
}

static void reduction(bool) {
  const int rows = 40, columns = 1000;
  std::vector<float> in(static_cast<size_t>(rows * columns)), out(rows);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 7);
  harness::check(LAUNCH(row_sums, rows, 256, 0, nullptr, in.data(), out.data(), columns));
  for (int r = 0; r < rows; ++r) {
    double exact = 0;  // small integers: any order of summation is exact
    for (int i = 0; i < columns; ++i) exact += static_cast<double>(in[static_cast<size_t>(r * columns + i)]);
    harness::expect(static_cast<double>(out[static_cast<size_t>(r)]) == exact, "row sum");
  }
  harness::print(out);
}

__global__ void where_am_i(unsigned* seen, dim3 grid, dim3 block) {
  if (gridDim.x != grid.x || gridDim.y != grid.y || gridDim.z != grid.z) return;
  if (blockDim.x != block.x || blockDim.y != block.y || blockDim.z != block.z) return;
  const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(&seen[b * (blockDim.x * blockDim.y * blockDim.z) + t], 1u + b);
}

static void dimensions(bool) {
  const dim3 grid(5, 3, 2), block(7, 4, 3);
  std::vector<unsigned> seen(30 * 84);
  harness::check(LAUNCH(where_am_i, grid, block, 0, nullptr, seen.data(), grid, block));
  for (size_t i = 0; i < seen.size(); ++i) harness::expect(seen[i] == 1 + i / 84, "each thread of each block once");
}

__global__ void count_up(unsigned long long* total) { atomicAdd(total, static_cast<unsigned long long>(blockIdx.x)); }

static void big_grid(bool) {
  const unsigned blocks = 70000;
  unsigned long long total = 0;
  harness::check(LAUNCH(count_up, blocks, 4, 0, nullptr, &total));
  harness::expect(total == 4ull * blocks * (blocks - 1) / 2, "sum of block numbers");
}

// ---- warp operations against tables ---------------------------------------------------------------------------------

struct ShuffleRow { int kind, argument, width; };

__global__ void shuffle_table(const ShuffleRow* rows, int count, int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < count; ++i) {
    const ShuffleRow row = rows[i];
    const int value = 1000 + lane;
    int result = 0;
    if (row.kind == 0) result = __shfl_sync(0xffffffffu, value, row.argument, row.width);
    if (row.kind == 1) result = __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(row.argument), row.width);
    if (row.kind == 2) result = __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(row.argument), row.width);
    if (row.kind == 3) result = __shfl_xor_sync(0xffffffffu, value, row.argument, row.width);
    out[i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)] = result;
  }
}

// The PTX manual's shfl.sync in its own terms (clamp c, segment mask), independently of simt/warp.cpp.
static int ptx_shuffle(int kind, int lane, int b, int width) {
  const int segmask = (32 - width), clamp = kind == 1 ? 0 : 31;
  const int max_lane = (lane & segmask) | (clamp & ~segmask & 31), min_lane = lane & segmask;
  int j = lane;
  bool valid = true;
  if (kind == 0) {
    j = min_lane | (b & ~segmask & 31);
    valid = j <= max_lane;
  }
  if (kind == 1) {
    j = lane - b;
    valid = j >= max_lane;
  }
  if (kind == 2) {
    j = lane + b;
    valid = j <= max_lane;
  }
  if (kind == 3) {
    j = lane ^ b;
    valid = j <= max_lane;
  }
  return 1000 + (valid ? j : lane);
}

static void shuffles(bool) {
  std::vector<ShuffleRow> rows;
  for (int kind = 0; kind < 4; ++kind) {
    for (int width = 1; width <= 32; width *= 2) {
      for (int argument = 0; argument < 32; ++argument) rows.push_back({kind, argument, width});
    }
  }
  const int count = static_cast<int>(rows.size()), threads = 64;
  std::vector<int> out(rows.size() * static_cast<size_t>(threads));
  harness::check(LAUNCH(shuffle_table, 1, threads, 0, nullptr, rows.data(), count, out.data()));
  for (int i = 0; i < count; ++i) {
    const ShuffleRow& row = rows[static_cast<size_t>(i)];
    for (int t = 0; t < threads; ++t) {
      harness::expect(
          out[static_cast<size_t>(i * threads + t)] == ptx_shuffle(row.kind, t % 32, row.argument, row.width),
          "shuffle");
    }
  }
}

__global__ void vote_table(unsigned* out) {
  const unsigned t = threadIdx.x, lane = t % 32;
  unsigned* o = out + 16 * t;
  o[0] = __ballot_sync(0xffffffffu, lane % 3 == 0);
  o[1] = static_cast<unsigned>(__any_sync(0xffffffffu, lane == 31));
  o[2] = static_cast<unsigned>(__all_sync(0xffffffffu, lane < 31));
  o[3] = static_cast<unsigned>(__all_sync(0xffffffffu, 1));
  o[4] = lane < 8 ? __ballot_sync(0xffu, lane & 1) : __ballot_sync(0xffffff00u, lane & 1);
  o[5] = __reduce_add_sync(0xffffffffu, lane);
  o[6] = static_cast<unsigned>(__reduce_min_sync(0xffffffffu, static_cast<int>(lane) - 9));
  o[7] = __reduce_max_sync(0xffffffffu, lane * 2);
  o[8] = __reduce_xor_sync(0xffffffffu, lane == 3 ? 5u : 0u);
  o[9] = __match_any_sync(0xffffffffu, lane / 8);
  o[10] = static_cast<unsigned>(__syncthreads_count(static_cast<int>(t % 5 == 0)));
  o[11] = static_cast<unsigned>(__syncthreads_or(t == 40));
  o[12] = static_cast<unsigned>(__syncthreads_and(t < 40));
  o[13] = __activemask();
  o[14] = static_cast<unsigned>(__popc(__ballot_sync(0xffffffffu, t < 40)));
}

static void votes(bool) {
  const unsigned threads = 64;
  std::vector<unsigned> out(16 * threads);
  harness::check(LAUNCH(vote_table, 1, threads, 0, nullptr, out.data()));
  for (unsigned t = 0; t < threads; ++t) {
    const unsigned* o = &out[16 * t];
    const unsigned lane = t % 32;
    harness::expect(o[0] == 0x49249249u && o[1] == 1 && o[2] == 0 && o[3] == 1, "ballot, any, all");
    harness::expect(o[4] == (lane < 8 ? 0xaau : 0xaaaaaa00u), "ballot under two masks");
    harness::expect(o[5] == 496 && static_cast<int>(o[6]) == -9 && o[7] == 62 && o[8] == 5, "warp reductions");
    harness::expect(o[9] == 0xffu << (lane / 8 * 8), "match");
    harness::expect(o[10] == 13 && o[11] == 1 && o[12] == 0 && o[13] == 0xffffffffu, "block votes");
    harness::expect(o[14] == (t < 32 ? 32u : 8u), "popc of a ballot");
  }
}

// Lanes that have exited, and lanes that a block of 40 threads never had, are not waited for.
__global__ void partial_warp(unsigned* out) {
  if (threadIdx.x >= 20 && threadIdx.x < 32) return;
  out[threadIdx.x] = __ballot_sync(threadIdx.x < 32 ? 0xffffffffu : 0xffu, 1);
}

static void partial(bool) {
  std::vector<unsigned> out(40);
  harness::check(LAUNCH(partial_warp, 1, 40, 0, nullptr, out.data()));
  for (unsigned t = 0; t < 40; ++t) {
    harness::expect(out[t] == (t < 20 ? 0xfffffu : t < 32 ? 0u : 0xffu), "ballot of the live lanes");
  }
}

// Producers arrive, consumers wait: a two-stage hand-over through named barriers.
__global__ void hand_over(int* out, int steps) {
  SHARED(int, box, 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < steps; ++i) {
    if (threadIdx.x < 32) {
      if (i > 0) barrier_sync(2, 64);
      box[lane] = 100 * i + lane;
      barrier_arrive(1, 64);
    } else {
      barrier_sync(1, 64);
      out[32 * i + lane] = box[31 - lane];
      if (i + 1 < steps) barrier_arrive(2, 64);
    }
  }
}

static void named_barriers(bool) {
  const int steps = 5;
  std::vector<int> out(32 * steps);
  harness::check(LAUNCH(hand_over, 1, 64, 0, nullptr, out.data(), steps));
  for (int i = 0; i < steps; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      harness::expect(out[static_cast<size_t>(32 * i + lane)] == 100 * i + 31 - lane, "hand-over");
    }
  }
}

// ---- memory ---------------------------------------------------------------------------------------------------------

template <class T> __global__ void two_arrays(T* out) {
  SHARED(T, a, 33);
  SHARED(double, b, 17);
  DYNAMIC_SHARED(T, c);
  const int t = static_cast<int>(threadIdx.x);
  a[t] = T(t);
  if (t < 17) b[t] = 1000.0 + t;
  c[t] = T(2000 + t);
  __syncthreads();
  out[t] = a[31 - t] + T(b[t % 17]) + c[(t + 1) % 32];
}

static void shared_arrays(bool) {
  std::vector<float> f(32);
  std::vector<int> i(32);
  harness::check(LAUNCH((two_arrays<float>), 1, 32, 32 * sizeof(float), nullptr, f.data()));
  harness::check(LAUNCH((two_arrays<int>), 1, 32, 32 * sizeof(int), nullptr, i.data()));
  for (int t = 0; t < 32; ++t) {
    const int exact = 31 - t + 1000 + t % 17 + 2000 + (t + 1) % 32;
    harness::expect(i[static_cast<size_t>(t)] == exact && f[static_cast<size_t>(t)] == static_cast<float>(exact),
                    "shared");
  }
}

__global__ void atomics_kernel(int* i, unsigned* u, float* f, unsigned long long* l) {
  const int t = static_cast<int>(threadIdx.x);
  atomicAdd(i, t);
  atomicMax(i + 1, t);
  atomicMin(i + 2, -t);
  atomicOr(u, 1u << (t % 32));
  atomicInc(u + 1, 9u);
  atomicAdd(f, 0.5f);
  atomicAdd(l, 1ull << 33);
  int seen = atomicAdd(i + 3, 0);
  for (int assumed = seen + 1; assumed != seen;) {
    assumed = seen;
    seen = atomicCAS(i + 3, assumed, assumed + 2);
  }
}

static void atomic_operations(bool) {
  int i[4] = {};
  unsigned u[2] = {};
  float f = 0.0f;
  unsigned long long l = 0;
  harness::check(LAUNCH(atomics_kernel, 3, 96, 0, nullptr, i, u, &f, &l));
  harness::expect(i[0] == 3 * 95 * 96 / 2 && i[1] == 95 && i[2] == -95 && i[3] == 2 * 288, "integer atomics");
  harness::expect(u[0] == 0xffffffffu && u[1] == 288 % 10 && f == 144.0f && l == 288ull << 33, "other atomics");
}

__global__ void zero_filled_copy(const float* in, float* out, int n) {
  SHARED(float, tile, 128);
  const int first = 4 * static_cast<int>(threadIdx.x), left = n - first;
  async_copy<16>(&tile[first], in + (left > 0 ? first : 0), left >= 4 ? 16 : left > 0 ? 4 * left : 0);
  async_commit();
  async_wait<0>();
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 128; i += 32) out[i] = tile[i];
}

static void async_tail(bool) {
  std::vector<float> in(101, 3.0f), out(128, -1.0f);
  harness::check(LAUNCH(zero_filled_copy, 1, 32, 0, nullptr, in.data(), out.data(), 101));
  for (size_t i = 0; i < out.size(); ++i) harness::expect(out[i] == (i < 101 ? 3.0f : 0.0f), "zero-filled tail");
}

// ---- matrix fragments against a float64 product ---------------------------------------------------------------------

// A through ldmatrix, B (stored K x N) through ldmatrix.trans, C and D straight from the fragment table.
template <class T> __global__ void product(const T* a, const T* b, const float* c, float* d) {
  SHARED(T, a_tile, 16 * 24);  // padded rows of 48 bytes: addresses stay 16-byte aligned
  SHARED(T, b_tile, 16 * 8);
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) a_tile[i / 16 * 24 + i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) b_tile[i] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  load_matrix<4>(fa, &a_tile[lane % 16 * 24 + lane / 16 * 8]);
  load_matrix_transposed<2>(fb, &b_tile[lane % 16 * 8]);
  const float fc[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
  float fd[4];
  mma<T>(fd, fa, fb, fc);
  d[g * 8 + 2 * t] = fd[0];
  d[g * 8 + 2 * t + 1] = fd[1];
  d[(g + 8) * 8 + 2 * t] = fd[2];
  d[(g + 8) * 8 + 2 * t + 1] = fd[3];
}

template <class T> static void check_product() {
  std::vector<T> a(256), b(128);
  std::vector<float> c(128), d(128);
  unsigned state = 1;
  const auto draw = [&state] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int>(state >> 8) - (1 << 23)) / static_cast<float>(1 << 22);
  };
  for (T& x : a) store(&x, draw());
  for (T& x : b) store(&x, draw());
  for (float& x : c) x = draw();
  harness::check(LAUNCH((product<T>), 1, 32, 0, nullptr, a.data(), b.data(), c.data(), d.data()));
  for (size_t m = 0; m < 16; ++m) {
    for (size_t n = 0; n < 8; ++n) {
      double exact = static_cast<double>(c[m * 8 + n]), magnitude = std::fabs(exact);
      for (size_t k = 0; k < 16; ++k) {
        const double term = static_cast<double>(to_float(a[m * 16 + k])) * static_cast<double>(to_float(b[k * 8 + n]));
        exact += term;
        magnitude += std::fabs(term);
      }
      harness::expect(std::fabs(static_cast<double>(d[m * 8 + n]) - exact) <= 17 * 6e-8 * magnitude, "matrix product");
    }
  }
}

static void matrices(bool) {
  check_product<bf16>();
  check_product<f16>();
}

// ---- intrinsics -----------------------------------------------------------------------------------------------------

__global__ void intrinsics_kernel(unsigned* out) {
  out[0] = __umulhi(0xD2511F53u, 0x89abcdefu);
  out[1] = __float_as_uint(__fsqrt_rn(2.0f));
  out[2] = __float_as_uint(__fadd_rn(__fmul_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f), -1.0f - 0x1p-11f));
  out[3] = __float_as_uint(__fmaf_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f - 0x1p-11f));
  out[4] = __brev(0x1u) + static_cast<unsigned>(__clz(1)) + static_cast<unsigned>(__ffs(8));
  out[5] = __byte_perm(0x33221100u, 0x77665544u, 0x7250u);
  out[6] = static_cast<unsigned>(__umul64hi(0xffffffffffffffffull, 0xffffffffffffffffull) >> 32);
  const float4 v = __ldg(reinterpret_cast<const float4*>(out + 8));
  out[7] = __float_as_uint(v.w) + max(3u, 4u) + min(3u, 4u);
}

static void intrinsics(bool) {
  alignas(16) unsigned out[12] = {};
  out[11] = 10;
  harness::check(LAUNCH(intrinsics_kernel, 1, 1, 0, nullptr, out));
  harness::expect(out[0] == static_cast<unsigned>((0xD2511F53ull * 0x89abcdefull) >> 32), "umulhi");
  harness::expect(out[1] == 0x3fb504f3u, "sqrt");
  harness::expect(out[2] == 0u, "a separate multiplication drops 2^-24");
  harness::expect(out[3] == 0x33800000u, "a fused one keeps it");
  harness::expect(out[4] == 0x80000000u + 31 + 4, "bits");
  harness::expect(out[5] == 0x77225500u, "byte_perm");
  harness::expect(out[6] == 0xffffffffu, "umul64hi");
  harness::expect(out[7] == 17, "vector load, min, max");
}

int main(int argc, char** argv) {
  return harness::main(argc, argv,
                       {{"reduction", reduction},
                        {"dimensions", dimensions},
                        {"big_grid", big_grid},
                        {"shuffles", shuffles},
                        {"votes", votes},
                        {"partial", partial},
                        {"named_barriers", named_barriers},
                        {"shared_arrays", shared_arrays},
                        {"atomics", atomic_operations},
                        {"async_tail", async_tail},
                        {"matrices", matrices},
                        {"intrinsics", intrinsics}});
}
