// perform.h - one call of `combine`, given as Python objects: read, checked and run.
#pragma once
#include <Python.h>

namespace pyflowmap {

// kNo: the call does not fit and nothing was touched. kError: a Python error is set.
enum Answer { kNo = 0, kYes = 1, kError = -1 };

// `args` are those of Python's `combine`. `trusted`: the road is known to be free and the versions are somebody else's
// to count. `have_counters`: every input is known to have a version.
Answer perform(PyObject* const* args, Py_ssize_t nargs, bool trusted, bool have_counters = false);

PyObject* as_bool(Answer answer);

}  // namespace pyflowmap
