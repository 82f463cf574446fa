// options.h - how the emulated device runs: orders, fills and sizes that a correct kernel's result does not depend on.
#pragma once
#include <cstdint>

namespace simt {

// The order in which the threads of a block (and the blocks of a grid) are resumed.
enum class Order { forward, reverse, random };

// When the bytes of a cp.async move. A correct kernel cannot tell: `at_wait` shows a missing wait,
// `at_issue` shows a buffer that is refilled while it is still being read.
enum class AsyncCopy { at_wait, at_issue };

struct Options {
  Order order = Order::forward;
  std::uint64_t seed = 0;     // for Order::random
  unsigned char fill = 0x00;  // what shared memory (and a shuffle from an absent lane) holds before it is written
  AsyncCopy async_copy = AsyncCopy::at_wait;
  int host_threads = 1;     // blocks run in parallel on this many host threads
  int multiprocessors = 4;  // what the device reports; launchers size their grids by it
};

// One set of options per process, read at each launch.
Options options();
void set_options(const Options& options);

}  // namespace simt
