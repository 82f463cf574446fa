// rows.h - a tensor seen as rows of adjacent numbers under three outer dimensions, each with a stride of its own.
//
//   element (i, j, k, c) lies at data[i * stride[0] + j * stride[1] + k * stride[2] + c]      in elements of `dtype`
//
// A stride of 0 is a dimension that is shared (one vector per sample, heads that share keys). Null data: not given.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pyflowmap {

struct Rows {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[3] = {};

  explicit operator bool() const { return data != nullptr; }
};

// What the operands of a row-wise kernel share.
struct RowShape {
  int64_t outer[3] = {1, 1, 1};
  int64_t columns = 0;
};

// The address of element (i, j, k, 0) in a tensor of T.
template <class T> PFM_INLINE T* row(const Rows& x, int64_t i, int64_t j, int64_t k) {
  return static_cast<T*>(x.data) + (i * x.stride[0] + j * x.stride[1] + k * x.stride[2]);
}

}  // namespace pyflowmap
