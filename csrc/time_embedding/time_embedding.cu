// time_embedding.cu - two times per sample as cosines and sines, their tangents and gradients on the device.
//   y = [cos(w a), sin(w a), cos(w b), sin(w b)]        contract: time_embedding.h
#include "common/row_device.h"
#include "time_embedding/time_embedding.h"

namespace pyflowmap {
namespace time_embedding_device {
namespace {

using namespace row_device;

constexpr int kThreads = 128;

static __device__ __forceinline__ float read_one(const Rows& x, int64_t at) {
  if (!x.data) return 0.0f;
  if (x.dtype == DType::f32) return static_cast<const float*>(x.data)[at];
  if (x.dtype == DType::bf16) return to_float(static_cast<const bf16*>(x.data)[at]);
  return to_float(static_cast<const f16*>(x.data)[at]);
}

// The first or second time of sample b, or its tangent.
static __device__ __forceinline__ float time_of(const Rows& s, const Rows& t, bool span, int which, int64_t b) {
  const float first = read_one(s, b * s.stride[0]);
  if (which == 0) return first;
  const float second = read_one(t, b * t.stride[0]);
  return span ? second - first : second;
}

// ---- kernels ------------------------------------------------------------------------------------------------------------

// A thread takes a frequency of one time of one sample.
__global__ void __launch_bounds__(kThreads) time_embedding_kernel(const __grid_constant__ TimeEmbeddingForward p) {
  const int64_t h = p.frequencies, count = p.batch * 2 * h;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t both = i / h, b = both / 2, j = i - both * h;
    const int which = static_cast<int>(both % 2);
    const float w = static_cast<const float*>(p.w.data)[j];
    float s, c;
    sincosf(w * time_of(p.s, p.t, p.span, which, b), &s, &c);
    const int64_t at = b * p.y.stride[0] + 2 * which * h + j;
    put_one(p.y, at, c);
    put_one(p.y, at + h, s);
    if (!p.dy.data) continue;
    const float speed = w * time_of(p.ds, p.dt, p.span, which, b);
    const int64_t d_at = b * p.dy.stride[0] + 2 * which * h + j;
    put_one(p.dy, d_at, -s * speed);
    put_one(p.dy, d_at + h, c * speed);
  }
}

// A warp takes a sample.
__global__ void __launch_bounds__(kThreads)
    time_embedding_backward_kernel(const __grid_constant__ TimeEmbeddingBackward p) {
  const int64_t h = p.frequencies, warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; b < p.batch; b += warps) {
    float g[2], gd[2];
    UNROLL
    for (int which = 0; which < 2; ++which) {
      const float time = time_of(p.s, p.t, p.span, which, b);
      const int64_t g_at = b * p.gy.stride[0] + 2 * which * h, d_at = b * p.gdy.stride[0] + 2 * which * h;
      float sums[3] = {};
      for (int64_t j = lane; j < h; j += 32) {
        const float w = static_cast<const float*>(p.w.data)[j];
        float s, c;
        sincosf(w * time, &s, &c);
        const float g1 = read_one(p.gy, g_at + j), g2 = read_one(p.gy, g_at + h + j);
        const float d1 = read_one(p.gdy, d_at + j), d2 = read_one(p.gdy, d_at + h + j);
        sums[0] += w * (g2 * c - g1 * s);
        sums[1] += w * (d2 * c - d1 * s);
        sums[2] += w * w * (d1 * c + d2 * s);
      }
      warp_sums(sums);
      g[which] = sums[0] - time_of(p.ds, p.dt, p.span, which, b) * sums[2];
      gd[which] = sums[1];
    }
    if (lane != 0) continue;
    if (p.gs.data) put_one(p.gs, b * p.gs.stride[0], p.span ? g[0] - g[1] : g[0]);
    if (p.gt.data) put_one(p.gt, b * p.gt.stride[0], g[1]);
    if (p.gds.data) put_one(p.gds, b * p.gds.stride[0], p.span ? gd[0] - gd[1] : gd[0]);
    if (p.gdt.data) put_one(p.gdt, b * p.gdt.stride[0], gd[1]);
  }
}

// ---- launcher -----------------------------------------------------------------------------------------------------------

template <class Params>
Status start(void (*kernel)(Params), const Params& p, int64_t threads, int device, void* stream) {
  if (p.batch == 0) return {};
  if (p.s.dtype == DType::f64) return {1, "time_embedding: float64 is computed on the CPU only"};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;
  const int64_t wanted = (threads + kThreads - 1) / kThreads, most = count * int64_t{16};
  const auto blocks = static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
  return LAUNCH(kernel, dim3(blocks), dim3(kThreads), 0, static_cast<Stream>(stream), p);
}

}  // namespace
}  // namespace time_embedding_device

Status time_embedding_cuda(const TimeEmbeddingForward& p, int device, void* stream) {
  using namespace time_embedding_device;
  return start(time_embedding_kernel, p, p.batch * 2 * p.frequencies, device, stream);
}

Status time_embedding_backward_cuda(const TimeEmbeddingBackward& p, int device, void* stream) {
  using namespace time_embedding_device;
  return start(time_embedding_backward_kernel, p, p.batch * 32, device, stream);
}

}  // namespace pyflowmap
