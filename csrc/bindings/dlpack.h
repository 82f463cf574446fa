// dlpack.h - the part of the DLPack 1.3 ABI that we use, declared by ourselves: a tensor, and the C exchange API that
// torch >= 2.10 publishes as type(x).__dlpack_c_exchange_api__ (a capsule named "dlpack_exchange_api").
// Sizes and offsets are asserted for 64-bit machines; tests/csrc compares them with the header inside torch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pyflowmap::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t device_type;
  int32_t device_id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {  // DLTensor
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // elements, not bytes
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ExchangeHeader {  // DLPackExchangeAPIHeader
  Version version;
  ExchangeHeader* prev_api;
};

struct ExchangeAPI {  // DLPackExchangeAPI; all functions return 0, or -1 with a Python error set
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);  // non-owning; may be null
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

inline constexpr uint32_t kMajor = 1;

static_assert(sizeof(void*) == 8, "pyflowmap needs a 64-bit machine");
static_assert(sizeof(Device) == 8 && offsetof(Device, device_id) == 4);
static_assert(sizeof(DataType) == 4 && offsetof(DataType, bits) == 1 && offsetof(DataType, lanes) == 2);
static_assert(sizeof(Tensor) == 48);
static_assert(offsetof(Tensor, data) == 0 && offsetof(Tensor, device) == 8 && offsetof(Tensor, ndim) == 16);
static_assert(offsetof(Tensor, dtype) == 20 && offsetof(Tensor, shape) == 24 && offsetof(Tensor, strides) == 32);
static_assert(offsetof(Tensor, byte_offset) == 40);
static_assert(sizeof(ExchangeHeader) == 16 && offsetof(ExchangeHeader, prev_api) == 8);
static_assert(sizeof(ExchangeAPI) == 56 && offsetof(ExchangeAPI, header) == 0);
static_assert(offsetof(ExchangeAPI, managed_tensor_allocator) == 16);
static_assert(offsetof(ExchangeAPI, managed_tensor_from_py_object_no_sync) == 24);
static_assert(offsetof(ExchangeAPI, managed_tensor_to_py_object_no_sync) == 32);
static_assert(offsetof(ExchangeAPI, dltensor_from_py_object_no_sync) == 40);
static_assert(offsetof(ExchangeAPI, current_work_stream) == 48);

}  // namespace pyflowmap::dlpack
