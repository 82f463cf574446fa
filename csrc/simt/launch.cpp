// launch.cpp - the grid loop: checks the launch as the device would, then runs block after block.
#include "simt/launch.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "simt/block.h"
#include "simt/options.h"
#include "simt/sanitizer.h"

namespace simt {

namespace {

// cudaError_t's values
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;

std::mutex options_mutex;
Options current_options;

struct AllowedShared {
  const void* kernel;
  std::size_t bytes;
};
std::mutex allowed_mutex;
std::vector<AllowedShared> allowed;

std::size_t allowed_shared(const void* kernel) {
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  for (const AllowedShared& entry : allowed) {
    if (entry.kernel == kernel) return entry.bytes;
  }
  return Arena::kStaticLimit;
}

pyflowmap::Status failure(int code, const char* name, const char* what) {
  static thread_local char text[768];
  if (name) std::snprintf(text, sizeof text, "%s: %s", name, what);
  else std::snprintf(text, sizeof text, "%s", what);
  return {code, text};
}

// The i-th block to run: forward, backward, or strided by a number prime to the count.
struct BlockOrder {
  std::uint64_t count, first = 0, step = 1;
  BlockOrder(const Options& options, std::uint64_t n) : count(n) {
    if (options.order == Order::reverse) {
      first = n - 1;
      step = n - 1;
    } else if (options.order == Order::random) {
      std::uint64_t mixed = (options.seed + 1) * 0x9E3779B97F4A7C15ull;
      first = (mixed >> 32) % n;
      for (step = (mixed & 0xffffffffu) % n; std::gcd(step, n) != 1; ++step) {}
    }
  }
  std::uint64_t operator[](std::uint64_t i) const {
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(i) * step + first) % count);
  }
};

}  // namespace

Options options() {
  const std::lock_guard<std::mutex> lock(options_mutex);
  return current_options;
}

void set_options(const Options& options) {
  const std::lock_guard<std::mutex> lock(options_mutex);
  current_options = options;
}

pyflowmap::Status allow_shared(const void* kernel, std::size_t bytes) {
  if (bytes > Arena::kTotalLimit) return failure(kInvalidValue, nullptr, "more shared memory than a block can have");
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  for (AllowedShared& entry : allowed) {
    if (entry.kernel == kernel) {
      entry.bytes = bytes;
      return {};
    }
  }
  allowed.push_back({kernel, bytes});
  return {};
}

pyflowmap::Status run_grid(const char* name, const void* kernel, const Grid& grid, void (*thread_main)(const void*),
                           const void* arguments) {
  const dim3 blocks = grid.blocks, threads = grid.threads;
  const std::uint64_t block_threads = std::uint64_t{threads.x} * threads.y * threads.z;
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0 || block_threads == 0 || block_threads > 1024 || threads.z > 64 ||
      blocks.x > 0x7fffffffu || blocks.y > 65535u || blocks.z > 65535u) {
    return failure(kInvalidConfiguration, name, "invalid launch configuration");
  }
  if (grid.shared_bytes > allowed_shared(kernel)) {
    return failure(kInvalidValue, name, "more dynamic shared memory than was allowed for the kernel");
  }
  const Options chosen = options();
  Job job;
  job.name = name;
  job.grid = {blocks.x, blocks.y, blocks.z};
  job.extent = {threads.x, threads.y, threads.z};
  job.shared_bytes = grid.shared_bytes;
  job.thread_main = thread_main;
  job.arguments = arguments;

  const std::uint64_t count = std::uint64_t{blocks.x} * blocks.y * blocks.z;
  const BlockOrder order(chosen, count);
  std::atomic<std::uint64_t> next{0};
  std::atomic<bool> failed{false};
  char message[640] = {};
  std::mutex message_mutex;
  const auto work = [&](Block& block) {
    const Position outer = here;
    for (std::uint64_t i = next++; i < count && !failed; i = next++) {
      const std::uint64_t b = order[i];
      const uint3 index{static_cast<unsigned>(b % blocks.x), static_cast<unsigned>(b / blocks.x % blocks.y),
                        static_cast<unsigned>(b / blocks.x / blocks.y)};
      if (block.run(job, chosen, index, chosen.seed * 0x9E3779B97F4A7C15ull + b)) continue;
      const std::lock_guard<std::mutex> lock(message_mutex);
      if (!failed.exchange(true)) std::memcpy(message, block.message(), sizeof message);
    }
    here = outer;
  };

  const auto workers = static_cast<std::uint64_t>(std::max(1, chosen.host_threads));
  if (workers == 1 || count == 1) {
    static thread_local std::unique_ptr<Block> block;  // keeps its stacks for the next launch
    if (!block) block = std::make_unique<Block>();
    work(*block);
  } else {
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(std::min(workers, count)));
    for (std::uint64_t i = 0; i < std::min(workers, count); ++i) {
      helpers.emplace_back([&work] {
        Block block;
        work(block);
      });
    }
    for (std::thread& helper : helpers) helper.join();
  }
  acquire(join_sync());
  return failed ? failure(kLaunchFailure, nullptr, message) : pyflowmap::Status{};
}

}  // namespace simt
