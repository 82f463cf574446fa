// index_walker.h - walks the positions of a row in memory order and yields the index an IndexMap gives them, on the host.
#pragma once
#include "combine/combine.h"

namespace pyflowmap {
namespace {  // compiled once per instruction set: internal linkage, like the functions of common/dtype.h

struct IndexWalker {
  const IndexMap& map;
  int64_t digit[kMaxDims];
  int64_t index = 0;

  static inline __attribute__((always_inline)) IndexWalker at(const IndexMap& map, int64_t position) {
    IndexWalker walker{map, {}, 0};
    for (int d = map.dims - 1; d >= 0; --d) {
      walker.digit[d] = position % map.size[d];
      position /= map.size[d];
      walker.index += walker.digit[d] * map.stride[d];
    }
    if (map.dims == 0) walker.index = position;
    return walker;
  }

  inline __attribute__((always_inline)) void advance() {
    if (map.dims == 0) {
      ++index;
      return;
    }
    for (int d = map.dims - 1; d >= 0; --d) {
      index += map.stride[d];
      if (++digit[d] < map.size[d]) return;
      index -= digit[d] * map.stride[d];
      digit[d] = 0;
    }
  }
};

}  // namespace
}  // namespace pyflowmap
