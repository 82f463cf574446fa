#!/usr/bin/env bash
# sanitize.sh address,undefined|thread [pytest arguments]: builds the core with that sanitizer in .build/ and runs
# the tests marked `sanitizer` on it. The interpreter is not instrumented, so the run-time library is preloaded.
# (tests/simt compiles and runs instrumented programs of its own, without the interpreter; `make sanitize` calls it too.)
set -euo pipefail
cd "$(dirname "$0")/.."
sanitizer=$1; shift
python=$PWD/.venv/bin/python
build=.build/${sanitizer%%,*}
compiler=${CXX:-g++}

mkdir -p .build
cmake -S . -B "$build" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" -DPYFLOWMAP_SANITIZE="$sanitizer" -DPYFLOWMAP_SIMT=ON \
  -DPYFLOWMAP_CUDA=OFF -DPYFLOWMAP_WERROR=ON -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  > "$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" -j 2

case $sanitizer in
  address*) library=libasan.so ;;
  thread)   library=libtsan.so ;;
  *) echo "sanitize.sh: unknown sanitizer '$sanitizer'; it is address,undefined or thread" >&2; exit 2 ;;
esac
# detect_leaks=0: the interpreter frees nothing at exit. The race build sees the core alone: torch is not instrumented.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0
export PYFLOWMAP_CORE_FROM=$build OMP_NUM_THREADS=2
wrap=()
if [ "$sanitizer" = thread ] && setarch "$(uname -m)" -R true 2>/dev/null; then
  wrap=(setarch "$(uname -m)" -R)  # the shadow map of older run-time libraries clashes with randomised addresses
fi
echo "== tests under -fsanitize=$sanitizer"
PYTHONPATH=tools LD_PRELOAD="$("$compiler" -print-file-name=$library)" \
  "${wrap[@]}" "$python" -m pytest -p core_from -m sanitizer --ignore=tests/simt -p no:cacheprovider -p no:benchmark --capture=sys "$@"  # reports go to stderr itself
