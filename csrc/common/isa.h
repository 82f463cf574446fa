// isa.h - the instruction set that CPU kernels run with: the best this machine has, or a lesser one by request
// (PYFLOWMAP_ISA=base|v3|v4 or set_isa), so that a test can compare their bits.
#pragma once

namespace pyflowmap {

enum class Isa : int { base = 0, v3 = 1, v4 = 2 };

Isa best_isa();  // compiled in and supported by this processor
Isa active_isa();
bool set_isa(Isa isa);  // false if the machine or the build lacks it
const char* name_of(Isa isa);

}  // namespace pyflowmap
