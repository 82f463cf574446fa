// combine.cu - row-wise linear combinations of up to 8 tensors and their inner products, in one pass, on the device.
//   Y[k,r,:] = sum_j C[k,j,r] X[j,r,:]        contract: combine.h        kernels: combine_kernel.h
#include "combine/combine_kernel.h"

namespace pyflowmap {
namespace combine_device {
namespace {

// ---- every instantiation, cheapest first: the first that fits is taken -----------------------------------------------

template <class Args> struct Variant {
  int inputs, outputs, width;  // bounds; outputs are bounded only where their sums are in registers
  Sums sums;
  void (*combine_kernel)(Args);
};

constexpr Variant<Arguments> kPlain[] = {
    // J, K, width, sums          the same for the kernel: J, K, width, steps in flight, sums, resident blocks
    {2, 8, 4, Sums::none, combine_kernel<Arguments, 2, 8, 4, 4, Sums::none, 4>},
    {4, 8, 4, Sums::none, combine_kernel<Arguments, 4, 8, 4, 2, Sums::none, 4>},
    {8, 8, 4, Sums::none, combine_kernel<Arguments, 8, 8, 4, 1, Sums::none, 4>},
    {4, 8, 8, Sums::none, combine_kernel<Arguments, 4, 8, 8, 1, Sums::none, 5>},
    {8, 8, 8, Sums::none, combine_kernel<Arguments, 8, 8, 8, 1, Sums::none, 4>},
    {4, 2, 4, Sums::gram, combine_kernel<Arguments, 4, 2, 4, 2, Sums::gram, 4>},
};

constexpr Variant<ArgumentsWithExtras> kWithExtras[] = {
    {4, 8, 4, Sums::none, combine_kernel<ArgumentsWithExtras, 4, 8, 4, 1, Sums::none, 4>},
    {8, 8, 4, Sums::none, combine_kernel<ArgumentsWithExtras, 8, 8, 4, 1, Sums::none, 3>},
    {8, 2, 4, Sums::gram, combine_kernel<ArgumentsWithExtras, 8, 2, 4, 1, Sums::gram, 3>},
    {4, 2, 4, Sums::all, combine_kernel<ArgumentsWithExtras, 4, 2, 4, 1, Sums::all, 4>},
    {8, 8, 4, Sums::all, combine_kernel<ArgumentsWithExtras, 8, 8, 2, 1, Sums::all, 2>},
};

// ---- launcher -------------------------------------------------------------------------------------------------------

constexpr int64_t kColumnsPerUnit = 1024;
constexpr int64_t kMaxPartials = 4096;            // per row: what the last kernel adds up with one block
constexpr int64_t kBlocksPerMultiprocessor = 64;  // several rounds of resident blocks even out the last one

int64_t columns_per_unit(const CombineParams& p) {
  if (!p.gram && !p.cross && !p.sums) return kColumnsPerUnit;
  const int64_t least = (p.columns + kMaxPartials - 1) / kMaxPartials;
  return least <= kColumnsPerUnit ? kColumnsPerUnit : (least + kColumnsPerUnit - 1) / kColumnsPerUnit * kColumnsPerUnit;
}

int64_t units_per_row(const CombineParams& p) {
  const int64_t size = columns_per_unit(p);
  return p.columns == 0 ? 1 : (p.columns + size - 1) / size;
}

bool aligned(const Operand& x, int64_t rows, int64_t bytes) {
  const bool starts = reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(bytes) == 0;
  return starts && (rows <= 1 || x.row_stride * size_of(x.dtype) % bytes == 0);
}

// 8 elements per access where all operands are 16 bits wide and lie on 16 bytes.
int width_of(const CombineParams& p, int64_t rows) {
  if (p.gram || p.cross || p.sums || p.noise.present || p.mask.data) return 4;
  for (int j = 0; j < p.inputs; ++j) {
    if (size_of(p.x[j].dtype) != 2 || !aligned(p.x[j], rows, 16)) return 4;
  }
  for (int k = 0; k < p.outputs; ++k) {
    if (p.y[k].data && (size_of(p.y[k].dtype) != 2 || !aligned(p.y[k], rows, 16))) return 4;
  }
  return 8;
}

DeviceOperand device_operand(const Operand& x, int64_t rows, int width) {
  return {x.data, x.row_stride, x.dtype, aligned(x, rows, width * size_of(x.dtype))};
}

void set_factors(Factors* to, const CombineParams& p, const Coefficient (&from)[kMaxOutputs][kMaxTerms]) {
  for (int k = 0; k < p.outputs; ++k) {
    for (int j = 0; j < kMaxTerms; ++j) {
      const Coefficient& c = from[k][j];
      const int i = k * kMaxTerms + j;
      to->scalar[i] = c.scalar;
      to->vector[i] = c.vector;
      to->stride[i] = c.stride;
      to->is_double[i] = c.vector_is_double;
    }
  }
}

void set_arguments(Arguments* to, const CombineParams& p, int width) {
  to->inputs = p.inputs;
  to->outputs = p.outputs;
  to->terms = p.inputs + (p.noise.present ? 1 : 0);
  to->rows = p.rows;
  to->columns = p.columns;
  to->columns_per_unit = static_cast<int>(columns_per_unit(p));
  to->units_per_row = static_cast<int>(units_per_row(p));
  for (int j = 0; j < p.inputs; ++j) to->x[j] = device_operand(p.x[j], p.rows, width);
  for (int k = 0; k < p.outputs; ++k) {
    to->y[k] = device_operand(p.y[k], p.rows, width);
    to->clamp[k] = p.clamp[k];
    to->low[k] = static_cast<float>(p.low[k]);
    to->high[k] = static_cast<float>(p.high[k]);
  }
  set_factors(&to->a, p, p.a);
  to->gram = static_cast<float*>(p.gram);
  to->cross = static_cast<float*>(p.cross);
  to->sums = static_cast<float*>(p.sums);
  to->gram_count = p.gram ? p.outputs * (p.outputs + 1) / 2 : 0;
  to->cross_count = p.cross ? p.outputs * to->terms : 0;
  to->sums_count = p.sums ? p.outputs : 0;
  to->partials = combine_workspace_bytes(p) > 0 ? static_cast<float*>(p.workspace) : nullptr;
}

template <class Args, size_t N>
Status start(const Variant<Args> (&variants)[N], Args& arguments, int width, Sums sums, int multiprocessors,
             Stream stream) {
  const int64_t units = arguments.rows * arguments.units_per_row;
  const int64_t wanted = (units + kWarpsPerBlock - 1) / kWarpsPerBlock,
                most = multiprocessors * kBlocksPerMultiprocessor;
  const int64_t blocks = wanted < most ? wanted : most;
  arguments.step_rows = blocks * kWarpsPerBlock / arguments.units_per_row;
  arguments.step_units = static_cast<int>(blocks * kWarpsPerBlock % arguments.units_per_row);
  for (const Variant<Args>& variant : variants) {
    if (variant.width != width || variant.inputs < arguments.inputs || variant.outputs < arguments.outputs) continue;
    if (variant.sums != sums) continue;
    return LAUNCH(variant.combine_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, arguments);
  }
  return {1, "combine: no kernel for this call"};
}

}  // namespace
}  // namespace combine_device

size_t combine_workspace_bytes(const CombineParams& p) {
  const int terms = p.inputs + (p.noise.present ? 1 : 0);
  const int64_t reductions =
      (p.gram ? p.outputs * (p.outputs + 1) / 2 : 0) + (p.cross ? p.outputs * terms : 0) + (p.sums ? p.outputs : 0);
  const int64_t units = combine_device::units_per_row(p);
  return reductions == 0 || units == 1 ? 0 : static_cast<size_t>(p.rows * reductions * units) * sizeof(float);
}

Status combine_cuda(const CombineParams& p, int device, void* stream_pointer) {
  using namespace combine_device;
  if (p.rows == 0 || p.outputs == 0) return {};
  for (int j = 0; j < p.inputs; ++j) {
    if (p.x[j].dtype == DType::f64) return {1, "combine: float64 is computed on the CPU only"};
  }
  for (int k = 0; k < p.outputs; ++k) {
    if (p.y[k].dtype == DType::f64) return {1, "combine: float64 is computed on the CPU only"};
  }
  const bool reduces = p.gram || p.cross || p.sums;
  if (p.columns == 0 && !reduces) return {};
  if (combine_workspace_bytes(p) > 0 && !p.workspace) return {1, "combine: the reductions need a workspace"};

  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;
  const auto stream = static_cast<Stream>(stream_pointer);

  const int width = width_of(p, p.rows);
  const Sums sums = p.cross ? Sums::all : reduces ? Sums::gram : Sums::none;
  const bool extras = p.noise.present || p.mask.data || p.cross || (reduces && (p.inputs > 4 || p.outputs > 2));
  ArgumentsWithExtras arguments = {};
  set_arguments(&arguments, p, width);
  Status status;
  if (extras) {
    if (p.mask.data) set_factors(&arguments.b, p, p.b);
    arguments.noise = p.noise;
    arguments.mask = p.mask;
    // A wide Gram matrix without a cross Gram runs on the kernel that has both.
    const Sums kept = sums == Sums::gram && p.outputs > 2 ? Sums::all : sums;
    status = start(kWithExtras, arguments, width, kept, count, stream);
  } else {
    status = start(kPlain, static_cast<Arguments&>(arguments), width, sums, count, stream);
  }
  if (!status.ok() || !arguments.partials) return status;

  const int64_t items = p.rows * (arguments.gram_count + arguments.cross_count + arguments.sums_count);
  const int64_t most = count * kBlocksPerMultiprocessor;
  const auto blocks = static_cast<unsigned>(items < most ? items : most);
  return LAUNCH(combine_finish_kernel, dim3(blocks), dim3(kFinishThreads), 0, stream,
                static_cast<const Arguments&>(arguments));
}

}  // namespace pyflowmap
