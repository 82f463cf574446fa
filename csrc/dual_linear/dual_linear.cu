// dual_linear.cu - a linear layer and its tangent on few rows, one pass over the weight, on the device.
//   y[r, o] = sum_i x[r, i] W[o, i] + b[o]      dy[r, o] = sum_i dx[r, i] W[o, i]      contract: dual_linear.h
//
// A warp makes one output of every row: its lanes walk a row of W in 16-byte steps, so the loads of a warp are adjacent,
// and one output per warp makes the most warps, which is what hides the latency of a matrix this small.
#include "common/launch.h"
#include "dual_linear/dual_linear.h"

namespace pyflowmap {
namespace dual_linear_device {
namespace {

constexpr int kWarp = 32, kWarps = 4;
constexpr int64_t kMostBlocks = 1 << 16;

template <class T, int kWidth> struct alignas(sizeof(T) * kWidth) Pack { T of[kWidth]; };

// Vector v of x and then dx, or of y and then dy. Chosen by value: an address of a parameter would move it to memory.
template <class T> __device__ __forceinline__ T* row_of(const LinearRows& x, const LinearRows& dx, int v, int rows) {
  void* const data = v < rows ? x.data : dx.data;
  const int64_t stride = v < rows ? x.stride : dx.stride;
  return static_cast<T*>(data) + (v < rows ? v : v - rows) * stride;
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

// blockIdx.y: which kVectors of the vectors, the rows of x and then those of dx. What is beyond adds up nothing.
template <class T, int kVectors, int kWidth>
__global__ void __launch_bounds__(kWarp* kWarps) dual_linear_kernel(DualLinearParams p) {
  using Wide = Pack<T, kWidth>;
  const int lane = threadIdx.x % kWarp, rows = static_cast<int>(p.rows);
  const int first = blockIdx.y * kVectors, vectors = (p.dx.data ? 2 * rows : rows) - first;
  for (int64_t o = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; o < p.outputs;
       o += static_cast<int64_t>(gridDim.x) * kWarps) {
    const T* weight = static_cast<const T*>(p.weight.data) + o * p.weight.stride;
    float sum[kVectors] = {};
    for (int64_t i = lane * kWidth; i < p.inputs; i += kWarp * kWidth) {
      const Wide w = *reinterpret_cast<const Wide*>(weight + i);
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        if (v >= vectors) continue;
        const Wide x = *reinterpret_cast<const Wide*>(row_of<const T>(p.x, p.dx, first + v, rows) + i);
        UNROLL
        for (int j = 0; j < kWidth; ++j) sum[v] += to_float(w.of[j]) * to_float(x.of[j]);
      }
    }
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      UNROLL
      for (int step = kWarp / 2; step > 0; step /= 2) sum[v] += __shfl_xor_sync(0xffffffffu, sum[v], step);
      if (lane != v % kWarp || v >= vectors) continue;
      const float shift = first + v < rows && p.bias ? to_float(static_cast<const T*>(p.bias)[o]) : 0.0f;
      store(row_of<T>(p.y, p.dy, first + v, rows) + o, sum[v] + shift);
    }
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <class T, int kWidth> bool steps_by(const LinearRows& x, int64_t rows) {
  constexpr int64_t kBytes = kWidth * static_cast<int64_t>(sizeof(T));
  return reinterpret_cast<uintptr_t>(x.data) % kBytes == 0 && (rows == 1 || x.stride % kWidth == 0);
}

template <class T, int kVectors, int kWidth> Status launch_vectors(const DualLinearParams& p, Stream stream) {
  const int64_t wanted = (p.outputs + kWarps - 1) / kWarps, vectors = p.rows * (p.dx.data ? 2 : 1);
  const dim3 grid(static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks),
                  static_cast<unsigned>((vectors + kVectors - 1) / kVectors));
  return LAUNCH((dual_linear_kernel<T, kVectors, kWidth>), grid, dim3(kWarp * kWarps), 0, stream, p);
}

// 8 vectors at once fill the registers; more read W again, from the cache.
template <class T, int kWidth> Status launch_width(const DualLinearParams& p, Stream stream) {
  return p.rows * (p.dx.data ? 2 : 1) <= 2 ? launch_vectors<T, 2, kWidth>(p, stream)
                                           : launch_vectors<T, 8, kWidth>(p, stream);
}

template <class T> Status launch_type(const DualLinearParams& p, Stream stream) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = p.inputs % kWide == 0 && steps_by<T, kWide>(p.weight, p.outputs) &&
                    steps_by<T, kWide>(p.x, p.rows) && steps_by<T, kWide>(p.dx, p.rows);
  return wide ? launch_width<T, kWide>(p, stream) : launch_width<T, 1>(p, stream);
}

}  // namespace
}  // namespace dual_linear_device

Status dual_linear_cuda(const DualLinearParams& p, int device, void* stream) {
  using namespace dual_linear_device;
  if (!within_limits(p)) return {1, "rows, sizes or dtype out of bounds"};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  const Stream s = static_cast<Stream>(stream);
  if (p.dtype == DType::f32) return launch_type<float>(p, s);
  if (p.dtype == DType::bf16) return launch_type<bf16>(p, s);
  return launch_type<f16>(p, s);
}

}  // namespace pyflowmap
