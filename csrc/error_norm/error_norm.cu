// error_norm.cu - the size of a Runge-Kutta step's error in tolerances, per sample, in one pass.
//   contract: error_norm.h        kernels: error_norm_kernel.h
#include "common/column_sums.h"
#include "error_norm/error_norm_kernel.h"

namespace pyflowmap {
namespace error_norm_device {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 64;  // several rounds of resident blocks even out the last one

int64_t units_per_row(const ErrorNorm& p) {
  return p.shape.columns == 0 ? 1 : (p.shape.columns + kColumnsPerUnit - 1) / kColumnsPerUnit;
}

}  // namespace
}  // namespace error_norm_device

size_t error_norm_workspace_bytes(const ErrorNorm& p) {
  const int64_t units = error_norm_device::units_per_row(p);
  return units == 1 ? 0 : static_cast<size_t>(rows_of(p.shape) * units) * sizeof(float);
}

Status error_norm_cuda(const ErrorNorm& p, int device, void* stream_pointer) {
  using namespace error_norm_device;
  const int64_t rows = rows_of(p.shape);
  if (rows == 0) return {};
  if (p.x.dtype == DType::f64) return {1, "error_norm: float64 is computed on the CPU only"};
  if (error_norm_workspace_bytes(p) > 0 && !p.workspace) return {1, "error_norm: the sums need a workspace"};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;
  const auto stream = static_cast<Stream>(stream_pointer);

  const Rows* all[kTerms + 2] = {};
  const Rows none;
  for (int j = 0; j < kTerms; ++j) all[j] = j < p.terms ? &p.k[j] : &none;
  all[kTerms] = &p.x;
  all[kTerms + 1] = &p.y;
  const int width = width_for(all, p.shape);
  Arguments arguments = {};
  for (int j = 0; j < p.terms; ++j) {
    arguments.k[j] = device_rows(p.k[j], p.shape, width);
    arguments.c[j] = static_cast<float>(p.c[j]);
  }
  arguments.x = device_rows(p.x, p.shape, width);
  arguments.y = device_rows(p.y, p.shape, width);
  arguments.terms = p.terms;
  arguments.rows = rows;
  arguments.columns = p.shape.columns;
  arguments.units_per_row = units_per_row(p);
  arguments.units = rows * arguments.units_per_row;
  arguments.rtol = static_cast<float>(p.rtol);
  arguments.atol = static_cast<float>(p.atol);
  arguments.factor = p.factor;
  arguments.sums = static_cast<float*>(p.sums);
  arguments.partials = arguments.units_per_row > 1 ? static_cast<float*>(p.workspace) : nullptr;

  const int64_t most = count * kBlocksPerMultiprocessor;
  const auto blocks = static_cast<unsigned>(arguments.units < most ? arguments.units : most);
  const auto kernel = width == 8 ? error_norm_kernel<8> : error_norm_kernel<4>;
  const Status status = LAUNCH(kernel, dim3(blocks), dim3(kThreads), 0, stream, arguments);
  if (!status.ok() || !arguments.partials) return status;
  return LAUNCH(error_norm_finish_kernel, dim3(static_cast<unsigned>(rows < most ? rows : most)), dim3(kFinishThreads),
                0, stream, arguments);
}

}  // namespace pyflowmap
