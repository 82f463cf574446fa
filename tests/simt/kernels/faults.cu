// faults.cu - kernels with one planted fault each, and their corrected twins (Faulty = false).
#include "harness.h"

using pyflowmap::async_commit;
using pyflowmap::async_copy;
using pyflowmap::async_wait;

template <bool Faulty> __global__ void write_past_end(float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n + (Faulty ? 1 : 0)) out[i] = 1.0f;
}

template <bool Faulty> __global__ void read_past_end(const float* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = in[i] + in[Faulty || i + 1 < n ? i + 1 : i];
}

// Through a pointer, so that it is the redzone that tells and not the bounds of the array's type.
template <bool Faulty> __global__ void write_past_shared(float* out) {
  SHARED(float, tile, 64);
  float* p = tile;
  p[threadIdx.x + (Faulty ? 1u : 0u)] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

template <bool Faulty> __global__ void index_past_shared(float* out) {
  SHARED(float, tile, 64);
  const unsigned i = threadIdx.x + (Faulty ? 1u : 0u);
  tile[i] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

template <bool Faulty> __global__ void read_unwritten_shared(float* out) {
  SHARED(float, tile, 64);
  if (!Faulty || threadIdx.x != 5) tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

template <bool Faulty> __global__ void shuffle_from_absent_lane(unsigned* out) {
  unsigned value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_down_sync(0xffffu, value, Faulty ? 1 : 0);
  out[threadIdx.x] = value;
}

template <bool Faulty> __global__ void missing_barrier(const float* in, float* out) {
  SHARED(float, tile, 128);
  tile[threadIdx.x] = in[threadIdx.x];
  if (!Faulty) __syncthreads();
  out[threadIdx.x] = tile[127 - threadIdx.x];
}

// The second barrier of a loop: the tile is overwritten while others still read it.
template <bool Faulty> __global__ void missing_second_barrier(const float* in, float* out) {
  SHARED(float, tile, 64);
  float sum = 0.0f;
  for (int i = 0; i < 3; ++i) {
    tile[threadIdx.x] = in[threadIdx.x] * static_cast<float>(i + 1);
    __syncthreads();
    sum += tile[63 - threadIdx.x];
    if (!Faulty) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Shuffles order no memory: lanes that exchange data through shared memory need __syncwarp.
template <bool Faulty> __global__ void missing_warp_barrier(float* out) {
  SHARED(float, tile, 32);
  tile[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<float>(threadIdx.x), 1);
  if (!Faulty) __syncwarp();
  const float other = __shfl_xor_sync(0xffffffffu, 0.0f, 1);
  out[threadIdx.x] = tile[31 - threadIdx.x] + other;
}

template <bool Faulty> __global__ void blocks_write_one_place(float* out) {
  out[threadIdx.x + (Faulty ? 0u : blockIdx.x * blockDim.x)] = static_cast<float>(blockIdx.x);
}

template <bool Faulty> __global__ void missing_async_wait(const float* in, float* out) {
  SHARED(float, tile, 256);
  async_copy<16>(&tile[4 * threadIdx.x], in + 4 * threadIdx.x);
  async_commit();
  if (!Faulty) async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[255 - 4 * threadIdx.x];
  if (Faulty) async_wait<0>();  // too late
}

template <bool Faulty> __global__ void async_never_waited(const float* in, float* out) {
  SHARED(float, tile, 256);
  async_copy<16>(&tile[4 * threadIdx.x], in + 4 * threadIdx.x);
  async_commit();
  if (!Faulty) async_wait<0>();
  __syncthreads();
  if (!Faulty) out[threadIdx.x] = tile[255 - 4 * threadIdx.x];
}

// A two-stage pipeline that waits for one group too few.
template <bool Faulty> __global__ void async_waits_too_little(const float* in, float* out) {
  SHARED(float, tile, 2 * 256);
  float sum = 0.0f;
  async_copy<16>(&tile[4 * threadIdx.x], in + 4 * threadIdx.x);
  async_commit();
  for (int i = 0; i < 4; ++i) {
    float* next = tile + 256 * ((i + 1) % 2);
    if (i < 3) async_copy<16>(next + 4 * threadIdx.x, in + 256 * (i + 1) + 4 * threadIdx.x);
    async_commit();
    async_wait<Faulty ? 2 : 1>();
    __syncthreads();
    sum += tile[256 * (i % 2) + 255 - 4 * threadIdx.x];
    __syncthreads();
  }
  async_wait<0>();
  out[threadIdx.x] = sum;
}

// The buffer is refilled while other threads still read it: shows when copies land at issue.
template <bool Faulty> __global__ void async_overwrites_early(const float* in, float* out) {
  SHARED(float, tile, 256);
  float sum = 0.0f;
  for (int i = 0; i < 3; ++i) {
    async_copy<16>(&tile[4 * threadIdx.x], in + 256 * i + 4 * threadIdx.x);
    async_commit();
    async_wait<0>();
    __syncthreads();
    sum += tile[255 - 4 * threadIdx.x];
    if (!Faulty) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool Faulty> __global__ void divergent_barrier(float* out) {
  if (!Faulty || threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

template <bool Faulty> __global__ void barriers_of_two_branches(float* out) {
  if (Faulty && threadIdx.x % 2) {
    out[threadIdx.x] = 2.0f;
    __syncthreads();
  } else {
    out[threadIdx.x] = 1.0f;
    __syncthreads();
  }
}

template <bool Faulty> __global__ void divergent_shuffle(float* out) {
  float value = 1.0f;
  if (!Faulty || threadIdx.x < 7) value = __shfl_xor_sync(0xffffffffu, value, 1);
  else __syncthreads();
  out[threadIdx.x] = value;
}

template <bool Faulty> __global__ void mask_without_caller(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(Faulty ? 0xfffffffeu : 0xffffffffu, 1.0f, 1);
}

template <bool Faulty> __global__ void misaligned_vector(const float* in, float4* out) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + (Faulty ? 1 : 0));
}

template <bool Faulty> __global__ void last_block_sums(const float* in, float* partials, unsigned* ticket, float* out) {
  SHARED(unsigned, last, 1);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = in[blockIdx.x];
    if (!Faulty) __threadfence();
    last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last[0] || threadIdx.x) return;
  if (!Faulty) __threadfence();
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partials[b];
  out[0] = sum;
}

template <bool Faulty> __global__ void too_much_shared(float* out) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x];
}

#define CALL(kernel, blocks, threads, ...)                                                 \
  harness::check(faulty ? LAUNCH((kernel<true>), blocks, threads, 0, nullptr, __VA_ARGS__) \
                        : LAUNCH((kernel<false>), blocks, threads, 0, nullptr, __VA_ARGS__))

static std::vector<float> ramp(int n) {
  std::vector<float> values(static_cast<std::size_t>(n));
  for (int i = 0; i < n; ++i) values[static_cast<std::size_t>(i)] = static_cast<float>(i % 97) + 0.25f;
  return values;
}

template <int N, class Launch> static void with_output(Launch launch) {
  std::vector<float> out(N, -1.0f);
  launch(out.data());
  harness::print(out);
}

int main(int argc, char** argv) {
  const std::vector<harness::Case> cases = {
      {"global_write", [](bool faulty) { with_output<100>([&](float* o) { CALL(write_past_end, 2, 64, o, 100); }); }},
      {"global_read",
       [](bool faulty) {
         const auto in = ramp(100);
         with_output<100>([&](float* o) { CALL(read_past_end, 2, 64, in.data(), o, 100); });
       }},
      {"shared_write", [](bool faulty) { with_output<64>([&](float* o) { CALL(write_past_shared, 1, 64, o); }); }},
      {"shared_index", [](bool faulty) { with_output<64>([&](float* o) { CALL(index_past_shared, 1, 64, o); }); }},
      {"uninitialised", [](bool faulty) { with_output<64>([&](float* o) { CALL(read_unwritten_shared, 1, 64, o); }); }},
      {"absent_lane",
       [](bool faulty) {
         std::vector<unsigned> out(32);
         CALL(shuffle_from_absent_lane, 1, 32, out.data());
         harness::print(out);
       }},
      {"barrier",
       [](bool faulty) {
         const auto in = ramp(128);
         with_output<128>([&](float* o) { CALL(missing_barrier, 1, 128, in.data(), o); });
       }},
      {"second_barrier",
       [](bool faulty) {
         const auto in = ramp(64);
         with_output<64>([&](float* o) { CALL(missing_second_barrier, 1, 64, in.data(), o); });
       }},
      {"warp_barrier", [](bool faulty) { with_output<32>([&](float* o) { CALL(missing_warp_barrier, 1, 32, o); }); }},
      {"between_blocks",
       [](bool faulty) { with_output<256>([&](float* o) { CALL(blocks_write_one_place, 4, 64, o); }); }},
      {"async_wait",
       [](bool faulty) {
         const auto in = ramp(256);
         with_output<64>([&](float* o) { CALL(missing_async_wait, 1, 64, in.data(), o); });
       }},
      {"async_never",
       [](bool faulty) {
         const auto in = ramp(256);
         with_output<64>([&](float* o) { CALL(async_never_waited, 1, 64, in.data(), o); });
       }},
      {"async_pipeline",
       [](bool faulty) {
         const auto in = ramp(1024);
         with_output<64>([&](float* o) { CALL(async_waits_too_little, 1, 64, in.data(), o); });
       }},
      {"async_overwrite",
       [](bool faulty) {
         const auto in = ramp(1024);
         with_output<64>([&](float* o) { CALL(async_overwrites_early, 1, 64, in.data(), o); });
       }},
      {"divergent", [](bool faulty) { with_output<64>([&](float* o) { CALL(divergent_barrier, 1, 64, o); }); }},
      {"two_branches",
       [](bool faulty) { with_output<64>([&](float* o) { CALL(barriers_of_two_branches, 1, 64, o); }); }},
      {"divergent_shuffle", [](bool faulty) { with_output<32>([&](float* o) { CALL(divergent_shuffle, 1, 32, o); }); }},
      {"mask", [](bool faulty) { with_output<32>([&](float* o) { CALL(mask_without_caller, 1, 32, o); }); }},
      {"misaligned",
       [](bool faulty) {
         const auto in = ramp(256);
         std::vector<float4> out(32);
         CALL(misaligned_vector, 1, 32, in.data(), out.data());
       }},
      {"last_block",
       [](bool faulty) {
         const auto in = ramp(9);
         std::vector<float> partials(9);
         unsigned ticket = 0;
         with_output<1>([&](float* o) { CALL(last_block_sums, 9, 32, in.data(), partials.data(), &ticket, o); });
       }},
      {"allow_shared",
       [](bool faulty) {
         std::vector<float> out(64);
         if (!faulty) harness::check(pyflowmap::allow_shared(too_much_shared<false>, 64 * 1024));
         harness::check(faulty ? LAUNCH((too_much_shared<true>), 1, 64, 64 * 1024, nullptr, out.data())
                               : LAUNCH((too_much_shared<false>), 1, 64, 64 * 1024, nullptr, out.data()));
         harness::print(out);
       }},
      {"configuration",
       [](bool faulty) {
         with_output<100>([&](float* o) { CALL(write_past_end, faulty ? 0 : 2, 64, o, faulty ? 99 : 100); });
       }},
  };
  return harness::main(argc, argv, cases);
}
