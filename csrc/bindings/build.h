// build.h - what the build contains and which instruction set runs.
#pragma once
#include <pybind11/pybind11.h>

namespace pyflowmap { void define_build(pybind11::module_& m); }  // namespace pyflowmap
