// norm_rope.cu - RMS norm and rotary positions of heads, their tangents and gradients on the device, in one pass.
//   contract: norm_rope.h        kernels: norm_rope_kernel.h
#include "norm_rope/norm_rope_kernel.h"

namespace pyflowmap {
namespace norm_rope_device {
namespace {

// ---- every instantiation ------------------------------------------------------------------------------------------------

template <class Arguments> struct Variant {
  int width;
  bool pair, held;
  void (*kernel)(Arguments);
};

// The first that fits is taken. Backward through both keeps four rows in registers: 16-byte accesses would not fit.
constexpr Variant<ForwardArguments> kForward[] = {
    {8, false, true, norm_rope_kernel<8, false, true>},   {8, true, true, norm_rope_kernel<8, true, true>},
    {4, false, true, norm_rope_kernel<4, false, true>},   {4, true, true, norm_rope_kernel<4, true, true>},
    {4, false, false, norm_rope_kernel<4, false, false>}, {4, true, false, norm_rope_kernel<4, true, false>},
};
constexpr Variant<BackwardArguments> kBackward[] = {
    {8, false, true, norm_rope_backward_kernel<8, false, true>},
    {4, false, true, norm_rope_backward_kernel<4, false, true>},
    {4, true, true, norm_rope_backward_kernel<4, true, true>},
    {4, false, false, norm_rope_backward_kernel<4, false, false>},
    {4, true, false, norm_rope_backward_kernel<4, true, false>},
};

template <class Arguments, size_t N>
const Variant<Arguments>& variant_for(const Variant<Arguments> (&variants)[N], int width, bool pair, int64_t half) {
  const Variant<Arguments>* last = nullptr;
  for (const Variant<Arguments>& v : variants) {
    if (v.pair != pair || v.width > width) continue;
    last = &v;
    if (v.held && half <= int64_t{32} * v.width) return v;
  }
  return *last;
}

// ---- launchers ----------------------------------------------------------------------------------------------------------

constexpr int64_t kBlocksPerMultiprocessor = 32;  // several rounds of resident blocks even out the last one
constexpr int64_t kMostChunks = 512;              // what the finishing kernel adds up in a few microseconds
constexpr int64_t kMostLongChunks = 2048;         // of one warp each

// Without angles a run is whole vectors, so that the second one lies on the same boundary.
int64_t half_of(const NormRope& p) { return p.cos ? p.shape.columns / 2 : ((p.shape.columns + 1) / 2 + 7) / 8 * 8; }

// 8 columns per access where all of these are 16 bits wide and lie on 16 bytes, in both runs.
template <size_t N> int width_of(const Rows* const (&all)[N], const NormRope& p) {
  return half_of(p) % 8 == 0 ? width_for(all, p.shape) : 4;
}

DeviceRows rows_for(const Rows& x, const NormRope& p, int width) {
  DeviceRows rows = device_rows(x, p.shape, width);
  rows.aligned &= half_of(p) % width == 0;
  return rows;
}

void set_common(Common* to, const NormRope& p, int width) {
  to->shape = p.shape;
  to->rows = rows_of(p.shape);
  to->eps = static_cast<float>(p.eps);
  to->per = static_cast<float>(1.0 / static_cast<double>(p.shape.columns));
  to->half = static_cast<int>(half_of(p));
  to->first = static_cast<int>(to->half < p.shape.columns ? to->half : p.shape.columns);
  to->group = 1;
  while (to->group < 32 && to->group * width < to->half) to->group *= 2;
  to->x = rows_for(p.x, p, width);
  to->dx = rows_for(p.dx, p, width);
  to->weight = rows_for(p.weight, p, 4);
  to->dweight = rows_for(p.dweight, p, 4);
  to->cos = device_rows(p.cos, p.shape, 4);
  to->sin = device_rows(p.sin, p.shape, 4);
}

ColumnSums plan(const NormRopeBackward& p, bool* fits) {
  const Rows* const results[] = {&p.gweight, &p.gdweight};
  const int64_t rows = rows_of(p.shape);
  // Whole rounds of a block at 64 columns and more; the cut is a matter of the shape alone.
  const bool held = half_of(p) <= 32 * 4;
  const int64_t chunk = held ? (rows / kMostChunks + 32) / 32 * 32 : rows / kMostLongChunks + 1;
  ColumnSums sums;
  *fits = plan_sums(results, 2, p.shape, chunk, &sums);
  return sums;
}

constexpr Status kNoDouble = {1, "norm_rope: float64 is computed on the CPU only"};
constexpr Status kTooLarge = {1, "norm_rope: rows of 2^30 columns or more"};

bool fits_device(const NormRope& p) { return p.shape.columns < int64_t{1} << 30; }

}  // namespace
}  // namespace norm_rope_device

Status norm_rope_cuda(const NormRopeForward& p, int device, void* stream) {
  using namespace norm_rope_device;
  if (rows_of(p.shape) == 0 || p.shape.columns == 0) return {};
  if (p.x.dtype == DType::f64) return kNoDouble;
  if (!fits_device(p)) return kTooLarge;
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;

  const Rows* const streams[] = {&p.x, &p.dx, &p.y, &p.dy};
  const auto& variant = variant_for(kForward, width_of(streams, p), static_cast<bool>(p.dy), half_of(p));
  ForwardArguments arguments = {};
  set_common(&arguments, p, variant.width);
  arguments.y = rows_for(p.y, p, variant.width);
  arguments.dy = rows_for(p.dy, p, variant.width);
  const int64_t per_block = kForwardWarps * (32 / arguments.group);
  const int64_t wanted = (arguments.rows + per_block - 1) / per_block, most = count * kBlocksPerMultiprocessor;
  const auto blocks = static_cast<unsigned>(wanted < most ? wanted : most);
  return LAUNCH(variant.kernel, dim3(blocks), dim3(32 * kForwardWarps), 0, static_cast<Stream>(stream), arguments);
}

size_t norm_rope_workspace_bytes(const NormRopeBackward& p) {
  bool fits = false;
  const ColumnSums sums = norm_rope_device::plan(p, &fits);
  return fits ? static_cast<size_t>(sums.partials(p.shape.columns)) * sizeof(float) : 0;
}

Status norm_rope_backward_cuda(const NormRopeBackward& p, int device, void* stream_pointer) {
  using namespace norm_rope_device;
  if (rows_of(p.shape) == 0 || p.shape.columns == 0) return {};
  if (p.x.dtype == DType::f64) return kNoDouble;
  if (!fits_device(p)) return kTooLarge;
  BackwardArguments arguments = {};
  bool fits = false;
  arguments.sums = plan(p, &fits);
  if (!fits) return {1, "norm_rope: a gradient is shared by rows that are apart"};
  if (arguments.sums.slots > 0 && !p.workspace) return {1, "norm_rope: the sums need a workspace"};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;
  const auto stream = static_cast<Stream>(stream_pointer);

  const Rows* const streams[] = {&p.x, &p.dx, &p.gy, &p.gdy, &p.gx, &p.gdx};
  const auto& variant = variant_for(kBackward, width_of(streams, p), static_cast<bool>(p.gdy), half_of(p));
  set_common(&arguments, p, variant.width);
  arguments.gy = rows_for(p.gy, p, variant.width);
  arguments.gdy = rows_for(p.gdy, p, variant.width);
  arguments.gx = rows_for(p.gx, p, variant.width);
  arguments.gdx = rows_for(p.gdx, p, variant.width);
  arguments.sum[0] = device_rows(p.gweight, p.shape, 4);
  arguments.sum[1] = device_rows(p.gdweight, p.shape, 4);
  arguments.partials = static_cast<float*>(p.workspace);
  const int64_t most = count * kBlocksPerMultiprocessor;
  const auto blocks = static_cast<unsigned>(arguments.sums.chunks < most ? arguments.sums.chunks : most);
  const Status status = LAUNCH(variant.kernel, dim3(blocks), dim3(variant.held ? 32 * kBackwardWarps : 32), 0, stream,
                               static_cast<const BackwardArguments&>(arguments));
  if (!status.ok() || arguments.sums.slots == 0) return status;
  FinishArguments finish = {};
  finish.shape = p.shape;
  finish.sums = arguments.sums;
  for (int v = 0; v < 2; ++v) finish.to[v] = arguments.sum[v];
  finish.partials = arguments.partials;
  return finish_column_sums(finish, count, stream);
}

}  // namespace pyflowmap
