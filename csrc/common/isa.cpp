// isa.cpp - finds the instruction set once; see isa.h.
#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pyflowmap {
namespace {

Isa find_best() {
#if defined(__x86_64__) && (defined(PYFLOWMAP_HAS_V3) || defined(PYFLOWMAP_HAS_V4))
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
#if defined(PYFLOWMAP_HAS_V4)
  if (v4) return Isa::v4;
#endif
#if defined(PYFLOWMAP_HAS_V3)
  if (v3) return Isa::v3;
#endif
#endif
  return Isa::base;
}

Isa find_initial() {
  const Isa best = best_isa();
  const char* wish = std::getenv("PYFLOWMAP_ISA");
  if (!wish) return best;
  for (Isa isa : {Isa::base, Isa::v3, Isa::v4}) {
    if (std::strcmp(wish, name_of(isa)) == 0 && isa <= best) return isa;
  }
  return best;
}

std::atomic<int>& current() {
  static std::atomic<int> isa{static_cast<int>(find_initial())};
  return isa;
}

}  // namespace

Isa best_isa() {
  static const Isa best = find_best();
  return best;
}

Isa active_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

bool set_isa(Isa isa) {
  if (isa > best_isa()) return false;
  current().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

const char* name_of(Isa isa) { return isa == Isa::v4 ? "v4" : isa == Isa::v3 ? "v3" : "base"; }

}  // namespace pyflowmap
