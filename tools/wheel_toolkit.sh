#!/usr/bin/env bash
# Runs in the build image before the wheels: the CUDA toolkit named by PYFLOWMAP_WHEEL_CUDA (13-0, say), or nothing.
set -euo pipefail
version=${PYFLOWMAP_WHEEL_CUDA:-}
[ -n "$version" ] || { echo "PYFLOWMAP_WHEEL_CUDA is not set: CPU wheels"; exit 0; }
case $(uname -m) in
  x86_64) arch=x86_64 ;;
  aarch64) arch=sbsa ;;
  *) echo "no CUDA toolkit for $(uname -m)" >&2; exit 1 ;;
esac
dnf -y install dnf-plugins-core
dnf config-manager --add-repo "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$arch/cuda-rhel8.repo"
dnf -y install "cuda-nvcc-$version" "cuda-cudart-devel-$version"
