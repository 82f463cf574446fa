// build.cpp - see build.h.
#include "bindings/build.h"

#include <string>

#include "bindings/dlpack.h"
#include "common/isa.h"
#include "common/parallel.h"

#if defined(PYFLOWMAP_CUDA)
#include <cuda_runtime_api.h>
#endif
#if defined(PYFLOWMAP_SIMT)
#include "simt/options.h"
#endif

#ifndef PYFLOWMAP_CUDA_ARCHS
#define PYFLOWMAP_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace pyflowmap {
namespace {

py::dict build() {
  py::dict d;
#if defined(__VERSION__)
  d["compiler"] = __VERSION__;
#else
  d["compiler"] = "unknown";
#endif
#if defined(_OPENMP)
  d["openmp"] = true;
  d["threads"] = omp_get_max_threads();
#else
  d["openmp"] = false;
  d["threads"] = 1;
#endif
  d["isa"] = name_of(active_isa());
  d["best_isa"] = name_of(best_isa());
  d["cuda_archs"] = PYFLOWMAP_CUDA_ARCHS;
#if defined(PYFLOWMAP_CUDA)
  d["cuda"] = true;
  d["cuda_runtime"] = CUDART_VERSION;
  int driver = 0;
  d["cuda_driver"] = cudaDriverGetVersion(&driver) == cudaSuccess ? driver : 0;
#else
  d["cuda"] = false;
#endif
#if defined(PYFLOWMAP_SIMT)
  d["simt"] = true;
#else
  d["simt"] = false;
#endif
  return d;
}

// sizes and offsets of the DLPack structures as declared here, for a test against torch's own header
py::dict dlpack_abi() {
  using namespace dlpack;
  py::dict d;
  d["DLTensor"] = py::make_tuple(sizeof(Tensor), offsetof(Tensor, data), offsetof(Tensor, device),
                                 offsetof(Tensor, ndim), offsetof(Tensor, dtype), offsetof(Tensor, shape),
                                 offsetof(Tensor, strides), offsetof(Tensor, byte_offset));
  d["DLPackExchangeAPI"] = py::make_tuple(
      sizeof(ExchangeAPI), offsetof(ExchangeAPI, header), offsetof(ExchangeAPI, managed_tensor_allocator),
      offsetof(ExchangeAPI, managed_tensor_from_py_object_no_sync),
      offsetof(ExchangeAPI, managed_tensor_to_py_object_no_sync),
      offsetof(ExchangeAPI, dltensor_from_py_object_no_sync), offsetof(ExchangeAPI, current_work_stream));
  return d;
}

void choose_isa(const std::string& name) {
  for (Isa isa : {Isa::base, Isa::v3, Isa::v4}) {
    if (name != name_of(isa)) continue;
    if (!set_isa(isa)) {
      throw py::value_error("set_isa: this machine or build lacks '" + name + "' (best: '" + name_of(best_isa()) +
                            "')");
    }
    return;
  }
  throw py::value_error("set_isa: unknown instruction set '" + name + "' (base, v3, v4)");
}

#if defined(PYFLOWMAP_SIMT)
void set_options(const std::string& order, uint64_t seed, int fill, const std::string& async_copy, int host_threads,
                 int multiprocessors) {
  simt::Options options;
  if (order == "forward") options.order = simt::Order::forward;
  else if (order == "reverse") options.order = simt::Order::reverse;
  else if (order == "random") options.order = simt::Order::random;
  else throw py::value_error("set_options: order '" + order + "' is none of forward, reverse, random");
  if (async_copy == "at_wait") options.async_copy = simt::AsyncCopy::at_wait;
  else if (async_copy == "at_issue") options.async_copy = simt::AsyncCopy::at_issue;
  else throw py::value_error("set_options: async_copy '" + async_copy + "' is neither at_wait nor at_issue");
  options.seed = seed;
  options.fill = static_cast<unsigned char>(fill);
  options.host_threads = host_threads;
  options.multiprocessors = multiprocessors;
  simt::set_options(options);
}
#endif

}  // namespace

void define_build(py::module_& m) {
  m.def("build", &build, "What this build contains.");
  m.def("dlpack_abi", &dlpack_abi, "Sizes and offsets of the DLPack structures declared in csrc/bindings/dlpack.h.");
  m.def("set_isa", &choose_isa, py::arg("name"), "Runs CPU kernels with 'base', 'v3' or 'v4'.");
#if defined(PYFLOWMAP_SIMT)
  m.def("set_options", &set_options, py::arg("order") = "forward", py::arg("seed") = 0, py::arg("fill") = 0,
        py::arg("async_copy") = "at_wait", py::arg("host_threads") = 1, py::arg("multiprocessors") = 4,
        "How the emulated device runs; a correct kernel's result depends on none of it.");
#endif
}

}  // namespace pyflowmap
