// attention.cu - softmax attention and its tangent on the device.
//   O = P V    dO = P dV + W V - mu O        contract: attention.h        kernel: attention_forward_kernel.h
#include "attention/attention.h"
#include "attention/attention_forward_kernel.h"

namespace pyflowmap {
namespace attention_device {
namespace {

// ---- every instantiation: the narrowest that fits is taken -------------------------------------------------------------

struct Variant {
  DType dtype;
  int columns;  // the larger of head_dim and value_dim is at most this; what is missing is filled with zeros
  bool tangent;
  int queries, threads;
  size_t (*shared_bytes)(bool dk, bool dv);
  void (*kernel)(AttentionForward, int);
};

template <class T> constexpr DType dtype_of = DType::f32;
template <> constexpr DType dtype_of<bf16> = DType::bf16;
template <> constexpr DType dtype_of<f16> = DType::f16;

template <class T, int D, bool kTangent, int M, int kRowWarps, int kColumnWarps, int kKeys>
constexpr Variant variant() {
  using C = ForwardConfig<T, D, kTangent, M, kRowWarps, kColumnWarps, kKeys>;
  return {dtype_of<T>, D, kTangent, C::kQueries, C::kThreads, &C::shared_bytes, &attention_forward_kernel<C>};
}

// A block of 4 warps, of which two or more share a multiprocessor; at most 99 KB of shared memory, which every device has.
// clang-format off
constexpr Variant kVariants[] = {
    // type, head, tangent, tiles of 16 queries per warp, warps: rows x columns, keys per tile
    variant<bf16,   64, true,  1, 4, 1, 64>(),
    variant<bf16,   64, false, 2, 4, 1, 64>(),
    variant<bf16,  128, true,  1, 4, 1, 32>(),
    variant<bf16,  128, false, 2, 4, 1, 32>(),
    variant<float,  64, true,  1, 4, 1, 32>(),
    variant<float,  64, false, 1, 4, 1, 32>(),
    variant<float, 128, true,  1, 4, 1, 16>(),  // 8 to 10 registers too few; 16 keys are the fewest
    variant<float, 128, false, 1, 4, 1, 32>(),
#if !defined(PYFLOWMAP_MINIMAL)
    variant<bf16,   32, true,  1, 4, 1, 32>(),
    variant<bf16,   32, false, 2, 4, 1, 64>(),
    variant<bf16,   48, true,  1, 4, 1, 32>(),
    variant<bf16,   48, false, 2, 4, 1, 64>(),
    variant<bf16,   80, true,  1, 4, 1, 48>(),
    variant<bf16,   80, false, 2, 4, 1, 64>(),
    variant<bf16,   96, true,  1, 4, 1, 32>(),
    variant<bf16,   96, false, 2, 4, 1, 32>(),
    variant<bf16,  256, true,  1, 2, 2, 32>(),
    variant<bf16,  256, false, 1, 4, 1, 32>(),
    variant<f16,    32, true,  1, 4, 1, 32>(),
    variant<f16,    32, false, 2, 4, 1, 64>(),
    variant<f16,    48, true,  1, 4, 1, 32>(),
    variant<f16,    48, false, 2, 4, 1, 64>(),
    variant<f16,    64, true,  1, 4, 1, 64>(),
    variant<f16,    64, false, 2, 4, 1, 64>(),
    variant<f16,    80, true,  1, 4, 1, 48>(),
    variant<f16,    80, false, 2, 4, 1, 64>(),
    variant<f16,    96, true,  1, 4, 1, 32>(),
    variant<f16,    96, false, 2, 4, 1, 32>(),
    variant<f16,   128, true,  1, 4, 1, 32>(),
    variant<f16,   128, false, 2, 4, 1, 32>(),
    variant<f16,   256, true,  1, 2, 2, 32>(),
    variant<f16,   256, false, 1, 4, 1, 32>(),
    variant<float, 256, true,  1, 1, 4, 16>(),
    variant<float, 256, false, 1, 2, 2, 16>(),
#endif
};
// clang-format on

const Variant* narrowest(DType dtype, int columns, bool tangent) {
  const Variant* best = nullptr;
  for (const Variant& v : kVariants) {
    if (v.dtype == dtype && v.tangent == tangent && v.columns >= columns && (!best || v.columns < best->columns))
      best = &v;
  }
  return best;
}

}  // namespace
}  // namespace attention_device

// ---- launcher -------------------------------------------------------------------------------------------------------

Status attention_forward_cuda(const AttentionForward& p, int device, void* stream) {
  using namespace attention_device;
  if (p.dtype == DType::f64) return {1, "attention: float64 is computed on the CPU only"};
  if (p.batch == 0 || p.heads == 0 || p.queries == 0 || p.value_dim == 0) return {};
  const int64_t most = 0x7fffffff - 256;  // tokens are counted in int, with room for the last tile
  if (p.queries > most || p.keys > most) return {1, "attention: more than 2^31 tokens"};
  const int columns = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  const bool tangent = p.d_o || p.mu;
  const Variant* const variant = narrowest(p.dtype, columns, tangent);
#if defined(PYFLOWMAP_MINIMAL)
  if (!variant) return {1, "attention: no kernel for this dtype and head_dim in a minimal build"};
#endif
  if (!variant) return {1, "attention: head_dim and value_dim of at most 256"};
  const int64_t query_blocks = (p.queries + variant->queries - 1) / variant->queries;
  const int64_t blocks = query_blocks * p.heads * p.batch;
  if (blocks > 0x7fffffff) return {1, "attention: more blocks than a grid holds"};

  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  const size_t shared = variant->shared_bytes(tangent && p.dk, tangent && p.dv);
  if (const Status status = allow_shared(variant->kernel, shared); !status.ok()) return status;
  return LAUNCH(variant->kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(variant->threads)),
                shared, static_cast<Stream>(stream), p, static_cast<int>(query_blocks));
}

}  // namespace pyflowmap
