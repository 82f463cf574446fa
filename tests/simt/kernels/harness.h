// harness.h - a test program's command line:  program CASE VARIANT [order=reverse] [fill=ff] [seed=3] [threads=2] [async=issue]
// It prints what the case computed, or "status CODE MESSAGE" and exits with 3 when a launch failed.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/async_copy.h"
#include "common/launch.h"
#include "common/tensor_core.h"

namespace harness {

inline std::string value(int argc, char** argv, const char* key, const char* fallback) {
  const std::string prefix = std::string(key) + "=";
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], prefix.c_str(), prefix.size()) == 0) return argv[i] + prefix.size();
  }
  return fallback;
}

// Under nvcc (a compile test) there is nothing to configure.
inline void configure([[maybe_unused]] int argc, [[maybe_unused]] char** argv) {
#if defined(PYFLOWMAP_SIMT)
  simt::Options options;
  const std::string order = value(argc, argv, "order", "forward");
  options.order = order == "reverse"  ? simt::Order::reverse
                  : order == "random" ? simt::Order::random
                                      : simt::Order::forward;
  options.seed = std::strtoull(value(argc, argv, "seed", "0").c_str(), nullptr, 10);
  options.fill = static_cast<unsigned char>(std::strtoul(value(argc, argv, "fill", "00").c_str(), nullptr, 16));
  options.host_threads = std::atoi(value(argc, argv, "threads", "1").c_str());
  if (value(argc, argv, "async", "wait") == "issue") options.async_copy = simt::AsyncCopy::at_issue;
  simt::set_options(options);
#endif
}

inline void check(const pyflowmap::Status& status) {
  if (status.ok()) return;
  std::printf("status %d %s\n", status.code, status.message);
  std::exit(3);
}

// Equal outputs print equal lines (bits, not decimals).
template <class T> void print(const std::vector<T>& values) {
  unsigned long long hash = 1469598103934665603ull;
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  std::printf("bits %016llx\n", hash);
}

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("wrong: %s\n", what);
  std::exit(4);
}

struct Case {
  const char* name;
  void (*run)(bool faulty);
};

inline int main(int argc, char** argv, const std::vector<Case>& cases) {
  if (argc < 3) return 2;
  configure(argc, argv);
  for (const Case& one : cases) {
    if (std::strcmp(one.name, argv[1]) != 0) continue;
    one.run(std::strcmp(argv[2], "faulty") == 0);
    std::printf("done\n");
    return 0;
  }
  std::fprintf(stderr, "no case %s\n", argv[1]);
  return 2;
}

}  // namespace harness
