// async_copy.h - cp.async: the bytes move when the group is waited for (or at issue, see options.h).
// The copy itself is instrumented code, so a bad address is reported by the sanitizers as the kernel's own.
#pragma once
#include <cstdint>
#include <cstring>

#include "simt/sync.h"

namespace simt {

struct Copy {
  void* to;
  const void* from;
  int bytes, from_bytes;  // the rest is zero-filled
};

// False if the copy is to be made at once.
bool defer_copy(const Copy& copy, const char* file, int line);
void commit_copies();
bool next_copy(int groups_in_flight, Copy* copy);  // false when at most that many groups are still in flight

inline void make_copy(const Copy& copy) {
  auto* to = static_cast<unsigned char*>(copy.to);
  const auto* from = static_cast<const unsigned char*>(copy.from);
  for (int i = 0; i < copy.bytes; ++i) to[i] = i < copy.from_bytes ? from[i] : 0;
}

template <int Bytes> inline void async_copy(void* shared, const void* global, int from_bytes, SIMT_SITE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
  const Copy copy{shared, global, Bytes, from_bytes};
  if (!defer_copy(copy, file, line)) make_copy(copy);
}

inline void async_commit() { commit_copies(); }

// -1 waits for all copies, committed or not.
inline void async_wait(int groups_in_flight) {
  Copy copy;
  while (next_copy(groups_in_flight, &copy)) make_copy(copy);
}

}  // namespace simt
