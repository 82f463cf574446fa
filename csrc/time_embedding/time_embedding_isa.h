// time_embedding_isa.h - what time_embedding.cpp (decides) and time_embedding_isa.cpp (computes) share.
#pragma once
#include "time_embedding/time_embedding.h"

namespace pyflowmap {

struct TimeEmbeddingLoops {  // over samples
  void (*forward)(const TimeEmbeddingForward&, int64_t first, int64_t last, void* space);
  void (*backward)(const TimeEmbeddingBackward&, int64_t first, int64_t last, void* space);
};

// The rows of `frequencies` numbers that a thread needs, of the arithmetic type.
constexpr int kTimeEmbeddingSpace = 7;

namespace base { extern const TimeEmbeddingLoops time_embedding_loops; }
namespace v3 { extern const TimeEmbeddingLoops time_embedding_loops; }
namespace v4 { extern const TimeEmbeddingLoops time_embedding_loops; }

}  // namespace pyflowmap
