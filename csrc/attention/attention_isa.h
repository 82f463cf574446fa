// attention_isa.h - what attention.cpp (decides) and attention*_isa.cpp (compute) share.
#pragma once
#include "attention/attention.h"

namespace pyflowmap {

// The cut depends on the shape alone. A row of any result does not depend on it but through the blocks of keys.
struct AttentionPlan {
  int query_block = 0, key_block = 0;
  int64_t query_blocks = 0, key_blocks = 0;
  // Backward: a unit is a run of key blocks of one head of keys. Where there is more than one run, the gradients of Q
  // are partial sums in `partial`: (run, sample, head, query, head_dim), gQ then gdQ.
  int64_t runs = 1, blocks_per_run = 0;
  void* partial = nullptr;
  int partial_pitch = 0;
};

// Units [first, last); false where there is no memory for their scratch.
using ForwardUnits = bool (*)(const AttentionForward&, const AttentionPlan&, int64_t first, int64_t last);
using BackwardUnits = bool (*)(const AttentionBackward&, const AttentionPlan&, int64_t first, int64_t last);

#define PYFLOWMAP_ATTENTION_UNITS(isa)                                                                    \
  namespace isa {                                                                                         \
  bool attention_forward_units(const AttentionForward&, const AttentionPlan&, int64_t, int64_t);          \
  bool attention_backward_units(const AttentionBackward&, const AttentionPlan&, int64_t, int64_t);        \
  bool attention_backward_sums(const AttentionBackward&, const AttentionPlan&, int64_t, int64_t);         \
  }
PYFLOWMAP_ATTENTION_UNITS(base)
PYFLOWMAP_ATTENTION_UNITS(v3)
PYFLOWMAP_ATTENTION_UNITS(v4)
#undef PYFLOWMAP_ATTENTION_UNITS

}  // namespace pyflowmap
