// activation.cu - a function of every element, alone or as the gate of another tensor, with its tangent; and backward.
//   y = f(a) b,  dy = f'(a) b da + f(a) db        contract: activation.h        kernel: activation_kernel.h
#include "activation/activation_kernel.h"

namespace pyflowmap {
namespace activation_device {
namespace {

// ---- every instantiation --------------------------------------------------------------------------------------------

struct Variant {
  bool gated, backward;
  int width;  // elements per access; 8 where all tensors are 16 bits wide
  void (*activation_kernel)(Arguments);
};

constexpr Variant kVariants[] = {
    {false, false, 4, activation_kernel<false, false, 4>}, {false, false, 8, activation_kernel<false, false, 8>},
    {false, true, 4, activation_kernel<false, true, 4>},   {false, true, 8, activation_kernel<false, true, 8>},
    {true, false, 4, activation_kernel<true, false, 4>},   {true, false, 8, activation_kernel<true, false, 8>},
    {true, true, 4, activation_kernel<true, true, 4>},     {true, true, 8, activation_kernel<true, true, 8>},
};

// ---- launcher -------------------------------------------------------------------------------------------------------

constexpr int64_t kBlocksPerMultiprocessor = 64;  // several rounds of resident blocks even out the last one

}  // namespace
}  // namespace activation_device

Status activation_cuda(const Activation& p, int device, void* stream_pointer) {
  using namespace activation_device;
  const RowShape& shape = p.shape;
  const int64_t rows = shape.outer[0] * shape.outer[1] * shape.outer[2];
  if (rows == 0 || shape.columns == 0) return {};
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int count = 0;
  if (const Status status = multiprocessors(device, &count); !status.ok()) return status;

  const Rows none;
  const Rows* in[kInputs] = {&p.a, &p.b, &p.da, &p.db, &p.gy, &p.gdy};
  const Rows* out[kOutputs] = {&p.y, &p.dy, &none, &none};
  if (p.backward) {
    const Rows* gradients[kOutputs] = {&p.ga, &p.gb, &p.gda, &p.gdb};
    for (int s = 0; s < kOutputs; ++s) out[s] = gradients[s];
  }
  const Rows* const all[] = {in[0], in[1], in[2], in[3], in[4], in[5], out[0], out[1], out[2], out[3]};
  const int width = width_for(all, shape);
  Arguments arguments = {};
  for (int s = 0; s < kInputs; ++s) arguments.in[s] = device_rows(*in[s], shape, width);
  for (int s = 0; s < kOutputs; ++s) arguments.out[s] = device_rows(*out[s], shape, width);
  arguments.shape = shape;
  arguments.units_per_row = (shape.columns + kColumnsPerUnit - 1) / kColumnsPerUnit;
  arguments.units = rows * arguments.units_per_row;
  arguments.kind = p.kind;
  arguments.tangents = p.backward ? static_cast<bool>(p.gdy) : static_cast<bool>(p.dy);

  const int64_t wanted = (arguments.units + kWarpsPerBlock - 1) / kWarpsPerBlock,
                most = count * kBlocksPerMultiprocessor;
  const auto blocks = static_cast<unsigned>(wanted < most ? wanted : most);
  for (const Variant& variant : kVariants) {
    if (variant.gated != static_cast<bool>(p.b) || variant.backward != p.backward || variant.width != width) continue;
    return LAUNCH(variant.activation_kernel, dim3(blocks), dim3(kThreads), 0, static_cast<Stream>(stream_pointer),
                  arguments);
  }
  return {1, "activation: no such variant"};
}

}  // namespace pyflowmap
