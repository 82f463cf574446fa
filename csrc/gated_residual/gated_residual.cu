// gated_residual.cu - y = x + gate h and its derivatives on the device, in one pass.
//   contract: gated_residual.h        kernels: gated_residual_kernel.h
#include "gated_residual/gated_residual_kernel.h"

namespace pyflowmap {
namespace gated_residual_device {
namespace {

// ---- every instantiation --------------------------------------------------------------------------------------------

constexpr int kSteps = 2;
struct Variant {
  int width;
  bool pair;
  void (*forward)(ForwardArguments);
  void (*backward)(BackwardArguments);
};
constexpr Variant kVariants[] = {
    {4, false, forward_kernel<4, kSteps, false>, backward_kernel<4, false>},
    {4, true, forward_kernel<4, kSteps, true>, backward_kernel<4, true>},
    {8, false, forward_kernel<8, kSteps, false>, backward_kernel<8, false>},
    {8, true, forward_kernel<8, kSteps, true>, backward_kernel<8, true>},
};

const Variant& variant_for(int width, bool pair) {
  for (const Variant& variant : kVariants) {
    if (variant.width == width && variant.pair == pair) return variant;
  }
  return kVariants[0];
}

// ---- launchers ------------------------------------------------------------------------------------------------------

constexpr int64_t kBlocksPerMultiprocessor = 64;  // several rounds of resident blocks even out the last one
constexpr Status kNoDouble = {1, "gated_residual: float64 is computed on the CPU only"};

template <size_t N> bool any_double(const Rows* const (&all)[N]) {
  for (const Rows* x : all) {
    if (*x && x->dtype == DType::f64) return true;
  }
  return false;
}

// Enough warps for the machine; a chunk of more rows leaves fewer partials. Of the shape alone.
ColumnSums plan(const GatedResidualBackward& p, bool* fits) {
  const int64_t pieces = (p.shape.columns + 127) / 128, wanted = rows_of(p.shape) * pieces / 4096;
  const Rows* results[] = {&p.ggate, &p.gdgate};
  ColumnSums sums;
  *fits = plan_sums(results, 2, p.shape, wanted < 4 ? 4 : wanted > 32 ? 32 : wanted, &sums);
  return sums;
}

dim3 grid_for(int64_t units, int multiprocessors) {
  const int64_t wanted = (units + kWarpsPerBlock - 1) / kWarpsPerBlock, most = multiprocessors * kBlocksPerMultiprocessor;
  return dim3(static_cast<unsigned>(wanted < most ? wanted : most));
}

}  // namespace
}  // namespace gated_residual_device

Status gated_residual_cuda(const GatedResidual& p, int device, void* stream_pointer) {
  using namespace gated_residual_device;
  if (rows_of(p.shape) == 0 || p.shape.columns == 0) return {};
  const Rows* all[] = {&p.x, &p.gate, &p.h, &p.dx, &p.dgate, &p.dh, &p.y, &p.dy};
  if (any_double(all)) return kNoDouble;
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;

  const int width = width_for(all, p.shape);
  ForwardArguments arguments = {};
  arguments.shape = p.shape;
  arguments.pieces = (p.shape.columns + 32 * width * kSteps - 1) / (32 * width * kSteps);
  arguments.units = rows_of(p.shape) * arguments.pieces;
  for (int i = 0; i < 6; ++i) arguments.in[i] = device_rows(*all[i], p.shape, width);
  arguments.y = device_rows(p.y, p.shape, width);
  arguments.dy = device_rows(p.dy, p.shape, width);
  return LAUNCH(variant_for(width, static_cast<bool>(p.dy)).forward, grid_for(arguments.units, count), dim3(kThreads), 0,
                static_cast<Stream>(stream_pointer), arguments);
}

size_t gated_residual_workspace_bytes(const GatedResidualBackward& p) {
  bool fits = false;
  const ColumnSums sums = gated_residual_device::plan(p, &fits);
  return fits ? static_cast<size_t>(sums.partials(p.shape.columns)) * sizeof(float) : 0;
}

Status gated_residual_backward_cuda(const GatedResidualBackward& p, int device, void* stream_pointer) {
  using namespace gated_residual_device;
  if (rows_of(p.shape) == 0 || p.shape.columns == 0) return {};
  const Rows* all[] = {&p.gate, &p.h, &p.dgate, &p.dh, &p.gy, &p.gdy, &p.gh, &p.ggate, &p.gdh, &p.gdgate};
  if (any_double(all)) return kNoDouble;
  BackwardArguments arguments = {};
  bool fits = false;
  arguments.sums = plan(p, &fits);
  if (!fits) return {1, "gated_residual: a gradient is shared by rows that are apart"};
  if (arguments.sums.slots > 0 && !p.workspace) return {1, "gated_residual: the sums need a workspace"};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;
  const auto stream = static_cast<Stream>(stream_pointer);

  const int width = width_for(all, p.shape);
  arguments.shape = p.shape;
  arguments.pieces = (p.shape.columns + 32 * width - 1) / (32 * width);
  arguments.units = arguments.sums.chunks * arguments.pieces;
  DeviceRows* to[] = {&arguments.gate, &arguments.h,   &arguments.dgate,     &arguments.dh,  &arguments.gy,
                      &arguments.gdy,  &arguments.gh, &arguments.vector[0], &arguments.gdh, &arguments.vector[1]};
  for (int i = 0; i < 10; ++i) *to[i] = device_rows(*all[i], p.shape, width);
  arguments.partials = static_cast<float*>(p.workspace);
  const Status status = LAUNCH(variant_for(width, static_cast<bool>(p.gdy)).backward, grid_for(arguments.units, count),
                               dim3(kThreads), 0, stream, arguments);
  if (!status.ok() || arguments.sums.slots == 0) return status;
  FinishArguments finish = {};
  finish.shape = p.shape;
  finish.sums = arguments.sums;
  for (int v = 0; v < 2; ++v) finish.to[v] = arguments.vector[v];
  finish.partials = arguments.partials;
  return finish_column_sums(finish, count, stream);
}

}  // namespace pyflowmap
