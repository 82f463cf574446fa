// norm_modulate.cu - y = n(x) (1 + scale) + shift and its derivatives on the device, in one pass.
//   contract: norm_modulate.h        kernels: norm_modulate_kernel.h
#include "norm_modulate/norm_modulate_kernel.h"

namespace pyflowmap {
namespace norm_modulate_device {
namespace {

// ---- every instantiation --------------------------------------------------------------------------------------------

template <class Arguments> struct Variant {
  int width, steps;
  bool pair, resident;
  void (*kernel)(Arguments);
};

constexpr Variant<ForwardArguments> kForward[] = {
    {4, 4, false, true, forward_kernel<4, 4, false, true>},   {4, 4, true, true, forward_kernel<4, 4, true, true>},
    {8, 2, false, true, forward_kernel<8, 2, false, true>},   {8, 2, true, true, forward_kernel<8, 2, true, true>},
    {4, 1, false, false, forward_kernel<4, 1, false, false>}, {4, 1, true, false, forward_kernel<4, 1, true, false>},
};
constexpr Variant<BackwardArguments> kBackward[] = {
    {4, 2, false, true, backward_kernel<4, 2, false, true>},   {4, 2, true, true, backward_kernel<4, 2, true, true>},
    {8, 1, false, true, backward_kernel<8, 1, false, true>},   {8, 1, true, true, backward_kernel<8, 1, true, true>},
    {4, 1, false, false, backward_kernel<4, 1, false, false>}, {4, 1, true, false, backward_kernel<4, 1, true, false>},
};

// The kernel that holds a row, or the one that reads it again.
template <class Arguments, size_t N>
const Variant<Arguments>& variant_for(const Variant<Arguments> (&variants)[N], int width, bool pair, int64_t columns) {
  const Variant<Arguments>* again = nullptr;
  for (const Variant<Arguments>& v : variants) {
    if (v.pair != pair) continue;
    if (!v.resident) again = &v;
    else if (v.width == width && columns <= int64_t{32} * kMaxWarps * v.width * v.steps) return v;
  }
  return *again;
}

// ---- launchers ------------------------------------------------------------------------------------------------------

constexpr int64_t kBlocksPerMultiprocessor = 32;  // several rounds of resident blocks even out the last one
constexpr int kWarpsOfRows = 4;                   // in a block, where a row takes one

template <class Arguments> int warps_per_row(const Variant<Arguments>& v, int64_t columns) {
  const int64_t held = int64_t{32} * v.width * v.steps, warps = (columns + held - 1) / held;
  return warps < kMaxWarps ? static_cast<int>(warps) : kMaxWarps;
}

// Enough groups of threads for the machine; a chunk of more rows leaves fewer partials. Of the shape alone.
ColumnSums plan(const NormModulateBackward& p, bool* fits) {
  const Rows* results[kVectors];
  for (int i = 0; i < kVectors; ++i) results[i] = &p.vector[i];
  const bool held = p.shape.columns <= 32 * kMaxWarps * 8;
  const int64_t warps = p.shape.columns / 256 + 1, wanted = rows_of(p.shape) * warps / 4096;
  ColumnSums sums;
  *fits = plan_sums(results, kVectors, p.shape, !held ? 1 : wanted < 2 ? 2 : wanted > 32 ? 32 : wanted, &sums);
  return sums;
}

template <class P> void set_common(Common* to, const P& p) {
  to->shape = p.shape;
  to->rows = rows_of(p.shape);
  to->layer = p.layer;
  to->eps = static_cast<float>(p.eps);
  to->per = static_cast<float>(1.0 / static_cast<double>(p.shape.columns));
}

template <class Arguments>
Status start(const Variant<Arguments>& v, Arguments& arguments, int64_t units, int multiprocessors, Stream stream) {
  arguments.warps_per_row = warps_per_row(v, arguments.shape.columns);
  const bool block = arguments.warps_per_row > 1;
  const int64_t per_block = block ? 1 : kWarpsOfRows;
  const int64_t wanted = (units + per_block - 1) / per_block, most = multiprocessors * kBlocksPerMultiprocessor;
  const int64_t blocks = wanted < most ? wanted : most;
  arguments.groups = blocks * per_block;
  const int warps = block ? arguments.warps_per_row : kWarpsOfRows;
  return LAUNCH(v.kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * warps)), 0, stream,
                arguments);
}

template <size_t N> bool any_double(const Rows* const (&all)[N]) {
  for (const Rows* x : all) {
    if (*x && x->dtype == DType::f64) return true;
  }
  return false;
}

constexpr Status kNoDouble = {1, "norm_modulate: float64 is computed on the CPU only"};

}  // namespace
}  // namespace norm_modulate_device

Status norm_modulate_cuda(const NormModulate& p, int device, void* stream) {
  using namespace norm_modulate_device;
  if (rows_of(p.shape) == 0 || p.shape.columns == 0) return {};
  const Rows* all[] = {&p.x, &p.scale, &p.shift, &p.dx, &p.dscale, &p.dshift, &p.y, &p.dy};
  if (any_double(all)) return kNoDouble;
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;

  const Variant<ForwardArguments>& variant =
      variant_for(kForward, width_for(all, p.shape), static_cast<bool>(p.dy), p.shape.columns);
  ForwardArguments arguments = {};
  set_common(&arguments, p);
  DeviceRows* to[] = {&arguments.x,      &arguments.scale,  &arguments.shift, &arguments.dx,
                      &arguments.dscale, &arguments.dshift, &arguments.y,     &arguments.dy};
  for (int i = 0; i < 8; ++i) *to[i] = device_rows(*all[i], p.shape, variant.width);
  return start(variant, arguments, arguments.rows, count, static_cast<Stream>(stream));
}

size_t norm_modulate_workspace_bytes(const NormModulateBackward& p) {
  bool fits = false;
  const ColumnSums sums = norm_modulate_device::plan(p, &fits);
  return fits ? static_cast<size_t>(sums.partials(p.shape.columns)) * sizeof(float) : 0;
}

Status norm_modulate_backward_cuda(const NormModulateBackward& p, int device, void* stream_pointer) {
  using namespace norm_modulate_device;
  if (rows_of(p.shape) == 0 || p.shape.columns == 0) return {};
  const Rows* all[] = {&p.x,  &p.scale, &p.dx,        &p.dscale,    &p.gy,        &p.gdy,
                       &p.gx, &p.gdx,   &p.vector[0], &p.vector[1], &p.vector[2], &p.vector[3]};
  if (any_double(all)) return kNoDouble;
  BackwardArguments arguments = {};
  bool fits = false;
  arguments.sums = plan(p, &fits);
  if (!fits) return {1, "norm_modulate: a gradient is shared by rows that are apart"};
  if (arguments.sums.slots > 0 && !p.workspace) return {1, "norm_modulate: the sums need a workspace"};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;
  const auto stream = static_cast<Stream>(stream_pointer);

  const Variant<BackwardArguments>& variant =
      variant_for(kBackward, width_for(all, p.shape), static_cast<bool>(p.gdy), p.shape.columns);
  set_common(&arguments, p);
  DeviceRows* to[] = {&arguments.x,   &arguments.scale, &arguments.dx, &arguments.dscale, &arguments.gy,
                      &arguments.gdy, &arguments.gx,    &arguments.gdx};
  for (int i = 0; i < 8; ++i) *to[i] = device_rows(*all[i], p.shape, variant.width);
  for (int v = 0; v < kVectors; ++v) arguments.vector[v] = device_rows(p.vector[v], p.shape, variant.width);
  arguments.partials = static_cast<float*>(p.workspace);
  const Status status = start(variant, arguments, arguments.sums.chunks, count, stream);
  if (!status.ok() || arguments.sums.slots == 0) return status;
  FinishArguments finish = {};
  finish.shape = p.shape;
  finish.sums = arguments.sums;
  for (int v = 0; v < kVectors; ++v) finish.to[v] = arguments.vector[v];
  finish.partials = arguments.partials;
  return finish_column_sums(finish, count, stream);
}

}  // namespace pyflowmap
