// attention_backward.cu - the backward pass of attention, through O or through O and dO, on the device.
//   gS = P * (go V' - D), ...        contract: attention.h        kernels: attention_backward_kernel.h
#include "attention/attention_backward_kernel.h"

namespace pyflowmap {
namespace attention_device {
namespace {

// ---- every instantiation, narrowest head first: the first that fits is taken ----------------------------------------

struct Side {
  void (*kernel)(BackwardArguments);
  int owned, threads;
  size_t bytes;
};

struct Variant {
  DType dtype;
  int dim;    // the larger of head_dim and value_dim is at most this
  bool both;  // through O and dO
  Side keys, queries;
};

template <class T> constexpr DType dtype_of = DType::f32;
template <> constexpr DType dtype_of<bf16> = DType::bf16;
template <> constexpr DType dtype_of<f16> = DType::f16;

template <class T, int D, bool kBoth, int kOwned, int kWalked, int kWarps, int kStages, int kResident>
constexpr Side keys() {
  using K = Backward<T, D, true, kBoth, kOwned, kWalked, kWarps, kStages>;
  return {key_gradients_kernel<K, kResident>, K::kOwned, K::kThreads, K::kBytes};
}
template <class T, int D, bool kBoth, int kOwned, int kWalked, int kWarps, int kStages, int kResident>
constexpr Side queries() {
  using K = Backward<T, D, false, kBoth, kOwned, kWalked, kWarps, kStages>;
  return {query_gradients_kernel<K, kResident>, K::kOwned, K::kThreads, K::kBytes};
}

// Of each side: rows a block owns, rows it walks over in a step, warps, stages, blocks that a multiprocessor is to hold.
// The gradients of a block's rows stay in its registers, up to 128 per thread: hence the few rows where heads are wide.
// Two lines ask for more blocks than their registers quite allow, since the two barriers of a step leave gaps: keys of
// (16 bits, 64, both) spill 7 to 9 registers, queries of (16 bits, 128, both) up to 2 on 10.0 and 12.0. Keys of
// (float, 256, both) need a few more than the 255 that a thread can have.
// Shared memory stays within the 99 KB that every device has, except (float, 256, both): 132 KB, which compute
// capabilities 8.6, 8.9 and 12.0 refuse.
#define PFM_LINE(T, D, both, of_keys, of_queries) \
  {dtype_of<T>, D, both, keys<T, D, both, PFM_UNPACK of_keys>(), queries<T, D, both, PFM_UNPACK of_queries>()}
#define PFM_UNPACK(...) __VA_ARGS__

constexpr Variant kVariants[] = {
    // type, head (the larger of head_dim and value_dim), through both, gradients of keys, gradients of queries
    PFM_LINE(bf16, 64, false, (64, 64, 4, 2, 2), (64, 64, 4, 2, 2)),
    PFM_LINE(bf16, 64, true, (64, 32, 8, 2, 2), (64, 32, 8, 2, 2)),
#if !defined(PYFLOWMAP_MINIMAL)
    PFM_LINE(bf16, 96, false, (64, 32, 4, 2, 2), (64, 32, 4, 2, 3)),
    PFM_LINE(bf16, 96, true, (32, 32, 4, 2, 2), (32, 32, 4, 2, 3)),
#endif
    PFM_LINE(bf16, 128, false, (64, 32, 4, 2, 2), (64, 32, 4, 2, 3)),
    PFM_LINE(bf16, 128, true, (32, 32, 4, 1, 2), (32, 32, 4, 1, 3)),
#if !defined(PYFLOWMAP_MINIMAL)
    PFM_LINE(bf16, 256, false, (32, 32, 4, 1, 2), (32, 32, 4, 1, 3)),
    PFM_LINE(bf16, 256, true, (16, 16, 4, 1, 2), (16, 16, 4, 1, 2)),
    PFM_LINE(f16, 64, false, (64, 64, 4, 2, 2), (64, 64, 4, 2, 2)),
    PFM_LINE(f16, 64, true, (64, 32, 8, 2, 2), (64, 32, 8, 2, 2)),
    PFM_LINE(f16, 128, false, (64, 32, 4, 2, 2), (64, 32, 4, 2, 3)),
    PFM_LINE(f16, 128, true, (32, 32, 4, 1, 2), (32, 32, 4, 1, 3)),
    PFM_LINE(f16, 256, false, (32, 32, 4, 1, 2), (32, 32, 4, 1, 3)),
    PFM_LINE(f16, 256, true, (16, 16, 4, 1, 2), (16, 16, 4, 1, 2)),
#endif
    PFM_LINE(float, 64, false, (32, 32, 4, 1, 3), (32, 32, 4, 1, 3)),
    PFM_LINE(float, 64, true, (32, 32, 4, 1, 2), (32, 32, 4, 1, 2)),
    PFM_LINE(float, 128, false, (32, 32, 4, 1, 2), (32, 32, 4, 1, 2)),
    PFM_LINE(float, 128, true, (16, 16, 4, 1, 2), (16, 16, 4, 1, 2)),
#if !defined(PYFLOWMAP_MINIMAL)
    PFM_LINE(float, 256, false, (16, 16, 4, 1, 2), (16, 16, 4, 1, 2)),
    PFM_LINE(float, 256, true, (16, 16, 4, 1, 1), (16, 16, 4, 1, 1)),
#endif
};

#undef PFM_LINE
#undef PFM_UNPACK

// ---- launcher -------------------------------------------------------------------------------------------------------

const Variant* find(const AttentionProblem& p, bool both) {
  const int dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  for (const Variant& v : kVariants) {
    if (v.dtype == p.dtype && v.both == both && v.dim >= dim) return &v;
  }
  return nullptr;
}

Status start(const Side& side, int64_t tokens, int64_t pairs, const BackwardArguments& arguments, Stream stream) {
  const int64_t blocks = (tokens + side.owned - 1) / side.owned * pairs;
  if (blocks == 0) return {};
  if (const Status status = allow_shared(side.kernel, side.bytes); !status.ok()) return status;
  return LAUNCH(side.kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(side.threads)), side.bytes,
                stream, arguments);
}

Status start_scalars(const BackwardArguments& arguments, float* lse, float* D, float* a, Stream stream) {
  constexpr int kWarps = kScalarThreads / 32;
  const int64_t rows = arguments.batch * arguments.heads * arguments.queries;
  if (rows == 0) return {};
  void (*kernel)(BackwardArguments, float*, float*, float*) = row_scalars_kernel<float>;
  if (arguments.dtype == DType::bf16) kernel = row_scalars_kernel<bf16>;
  if (arguments.dtype == DType::f16) kernel = row_scalars_kernel<f16>;
  return LAUNCH(kernel, dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps)), dim3(kScalarThreads), 0, stream,
                arguments, lse, D, a);
}

}  // namespace
}  // namespace attention_device

size_t attention_backward_workspace_bytes(const AttentionBackward& p) {
  const int64_t rows = p.batch * p.heads * p.queries;
  return static_cast<size_t>(rows) * (p.gdo ? 3 : 2) * sizeof(float);
}

Status attention_backward_cuda(const AttentionBackward& p, int device, void* stream_pointer) {
  using namespace attention_device;
  constexpr int64_t kMost = int64_t{1} << 30;  // tokens are counted in int, blocks (of four rows or more) in unsigned
  if (p.dtype == DType::f64) return {1, "attention: float64 is computed on the CPU only"};
  if (p.queries > kMost || p.keys > kMost || p.batch * p.heads * (p.queries + p.keys) > 4 * kMost) {
    return {1, "attention: more tokens than a grid has blocks"};
  }
  const bool both = static_cast<bool>(p.gdo);
  const Variant* const variant = find(p, both);
  if (p.head_dim > 256 || p.value_dim > 256) return {1, "attention: head_dim and value_dim are at most 256"};
  if (!variant) return {1, "attention: this build has no kernel for the head size or the type"};
  if (attention_backward_workspace_bytes(p) > 0 && !p.workspace) return {1, "attention: backward needs a workspace"};

  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  const auto stream = static_cast<Stream>(stream_pointer);
  const int64_t rows = p.batch * p.heads * p.queries;
  float* const lse = static_cast<float*>(p.workspace);
  BackwardArguments arguments;
  static_cast<AttentionBackward&>(arguments) = p;
  arguments.rows = {lse, lse + rows, lse + 2 * rows, static_cast<const float*>(p.mu)};
  if (const Status status = start_scalars(arguments, lse, lse + rows, lse + 2 * rows, stream); !status.ok())
    return status;
  if (p.gk || p.gv || p.gdk || p.gdv) {
    const Status status = start(variant->keys, p.keys, p.batch * p.kv_heads, arguments, stream);
    if (!status.ok()) return status;
  }
  if (p.gq || p.gdq) return start(variant->queries, p.queries, p.batch * p.heads, arguments, stream);
  return {};
}

}  // namespace pyflowmap
