#include "attention/attention.h"
namespace pyflowmap {
Status attention_forward_cuda(const AttentionForward&, int, void*) { return {1, "not written"}; }
}  // namespace pyflowmap
