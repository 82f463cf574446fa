// time_embedding.cpp - `time_embedding` on the CPU: chooses the instruction set and shares the samples among threads. The
// loops are in time_embedding_isa.cpp; the contract is time_embedding.h.
#include "time_embedding/time_embedding.h"

#include "common/isa.h"
#include "common/row_work.h"
#include "time_embedding/time_embedding_isa.h"

namespace pyflowmap {
namespace {

const TimeEmbeddingLoops& loops() {
#if defined(PYFLOWMAP_HAS_V4)
  if (active_isa() == Isa::v4) return v4::time_embedding_loops;
#endif
#if defined(PYFLOWMAP_HAS_V3)
  if (active_isa() >= Isa::v3) return v3::time_embedding_loops;
#endif
  return base::time_embedding_loops;
}

template <class Params, class Loop> Status run(const Params& p, const Loop& loop) {
  const int64_t size = p.s.dtype == DType::f64 ? 8 : 4;
  std::atomic<bool> fine{true};
  share(p.batch, p.batch * p.frequencies / 4096, [&](int64_t first, int64_t last) {
    const Memory space = memory_of(kTimeEmbeddingSpace * p.frequencies * size);
    if (space) loop(p, first, last, space.get());
    else fine = false;
  });
  return fine ? Status{} : kNoMemory;
}

}  // namespace

Status time_embedding_cpu(const TimeEmbeddingForward& p) { return run(p, loops().forward); }

Status time_embedding_backward_cpu(const TimeEmbeddingBackward& p) { return run(p, loops().backward); }

}  // namespace pyflowmap
