// attention.cpp - attention on the CPU: chooses the instruction set and the blocks, and shares the work among threads.
// The loops are in attention_isa.cpp and attention_backward_isa.cpp; the contract is attention.h.
#include "attention/attention.h"

#include <atomic>
#include <cstdlib>

#include "attention/attention_isa.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace pyflowmap {
namespace {

constexpr Status kNoMemory = {1, "no memory for the tiles of a thread"};

// Below this many multiply-adds (some 20 us) a second thread costs more than it gains.
constexpr double kWorkPerThread = 1e6;

#if defined(PYFLOWMAP_HAS_V4)
#define PICK_V4(function) \
  if (active_isa() == Isa::v4) return v4::function
#else
#define PICK_V4(function)
#endif
#if defined(PYFLOWMAP_HAS_V3)
#define PICK_V3(function) \
  if (active_isa() >= Isa::v3) return v3::function
#else
#define PICK_V3(function)
#endif
#define PICK(function) \
  PICK_V4(function);   \
  PICK_V3(function);   \
  return base::function

ForwardUnits forward_units() { PICK(attention_forward_units); }

int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

int64_t threads_for(const AttentionProblem& p, double products) {
  const double pairs =
      static_cast<double>(p.batch) * static_cast<double>(p.heads) * static_cast<double>(p.queries) * static_cast<double>(p.keys);
  return static_cast<int64_t>(pairs * (p.head_dim + p.value_dim) / 2 * products / kWorkPerThread) + 1;
}

}  // namespace

Status attention_forward_cpu(const AttentionForward& p) {
  if (p.batch == 0 || p.heads == 0 || p.queries == 0) return {};
  AttentionPlan plan;
  plan.query_block = getenv("QB")?atoi(getenv("QB")):128;
  plan.key_block = getenv("KB")?atoi(getenv("KB")):128;
  plan.query_blocks = ceil_div(p.queries, plan.query_block);
  std::atomic<bool> fine{true};
  const ForwardUnits run = forward_units();
  share(p.batch * p.heads * plan.query_blocks, threads_for(p, p.d_o ? 6 : 2), [&](int64_t first, int64_t last) {
    if (!run(p, plan, first, last)) fine = false;
  });
  return fine ? Status{} : kNoMemory;
}

Status attention_backward_cpu(const AttentionBackward&) { return {1, "not written"}; }

}  // namespace pyflowmap
