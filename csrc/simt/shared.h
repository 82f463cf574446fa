// shared.h - shared memory: arrays handed out of a per-block arena, each between redzones, filled before first use.
#pragma once
#include <cstddef>

namespace simt {

// The array declared at `tag`: every thread of a block gets the same one. The tag is the address of a static local of
// the declaring function, so each template instantiation has its own array, as under nvcc.
void* shared_array(const void* tag, std::size_t bytes, const char* name);
void* dynamic_shared();
std::size_t dynamic_shared_bytes();

}  // namespace simt

// type name[n] in shared memory. A reference to an array, so that UBSan checks its bounds and sizeof tells its size.
#define SHARED(type, name, n)    \
  static char name##_shared_tag; \
  type(&name)[n] = *reinterpret_cast<type(*)[n]>(::simt::shared_array(&name##_shared_tag, sizeof(type) * (n), #name))

// type* name: the dynamic shared memory of the launch.
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::simt::dynamic_shared())
