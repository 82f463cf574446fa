// attention.cpp - attention on the CPU: chooses the instruction set and the blocks, and shares the work among threads.
// The loops are in attention_isa.cpp and attention_backward_isa.cpp; the contract is attention.h.
#include "attention/attention.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

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

// A head of keys is cut where there are fewer heads than this, into runs of at least so many keys.
constexpr int64_t kBackwardUnits = 16, kKeysPerRun = 512;

ForwardUnits forward_units() { PICK(attention_forward_units); }

BackwardUnits backward_units() { PICK(attention_backward_units); }
BackwardUnits backward_sums() { PICK(attention_backward_sums); }

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

Status attention_backward_cpu(const AttentionBackward& p) {
  if (p.batch == 0 || p.heads == 0) return {};
  AttentionPlan plan;
  plan.query_block = getenv("QB")?atoi(getenv("QB")):64;
  plan.key_block = getenv("KB")?atoi(getenv("KB")):64;
  const int64_t key_blocks = ceil_div(p.keys, plan.key_block);
  // Long rows of few heads are cut into runs of keys, at a price in memory; by the shape, not by the threads.
  const int64_t wanted = ceil_div(kBackwardUnits, p.batch * p.kv_heads), most = p.keys / kKeysPerRun;
  plan.blocks_per_run = ceil_div(key_blocks, wanted < most ? wanted : most > 1 ? most : 1);
  plan.runs = plan.blocks_per_run > 0 ? ceil_div(key_blocks, plan.blocks_per_run) : 1;
  std::unique_ptr<char[]> partial;
  if (plan.runs > 1 && (p.gq || p.gdq)) {
    const int number = p.dtype == DType::f64 ? 8 : 4;
    plan.partial_pitch = static_cast<int>(ceil_div(p.head_dim, 64 / number) * 64 / number);
    const int64_t rows = p.batch * p.heads * p.queries;
    partial.reset(new (std::nothrow) char[static_cast<size_t>(2 * plan.runs * rows * plan.partial_pitch * number)]);
    if (!partial) return kNoMemory;
    plan.partial = partial.get();
  }
  std::atomic<bool> fine{true};
  const int64_t threads = threads_for(p, p.gdo ? 15 : 5);
  const auto all = [&](BackwardUnits run, int64_t units) {
    share(units, threads, [&](int64_t first, int64_t last) {
      if (!run(p, plan, first, last)) fine = false;
    });
  };
  all(backward_units(), p.batch * p.kv_heads * plan.runs);
  if (plan.partial && fine) all(backward_sums(), p.batch * p.heads * p.queries);
  return fine ? Status{} : kNoMemory;
}

}  // namespace pyflowmap
