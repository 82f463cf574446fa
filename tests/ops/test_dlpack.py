"""The DLPack structures that we declare ourselves are those of the header inside torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pyflowmap import _C

MEMBERS = {
    "DLTensor": ("data", "device", "ndim", "dtype", "shape", "strides", "byte_offset"),
    "DLPackExchangeAPI": (
        "header",
        "managed_tensor_allocator",
        "managed_tensor_from_py_object_no_sync",
        "managed_tensor_to_py_object_no_sync",
        "dltensor_from_py_object_no_sync",
        "current_work_stream",
    ),
}


def test_abi(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX or install g++")
    header = Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    if not header.exists():
        pytest.skip(f"this torch ships no {header.name}")
    lines = [
        f'#include "{header}"',
        "#include <cstddef>",
        "#include <cstdio>",
        "#include <initializer_list>",
        "int main() {",
    ]
    for struct, members in MEMBERS.items():
        numbers = ", ".join([f"sizeof({struct})", *(f"offsetof({struct}, {m})" for m in members)])
        lines.append(f'  for (size_t n : {{{numbers}}}) std::printf("%zu ", n);\n  std::printf("\\n");')
    source, program = tmp_path / "abi.cpp", tmp_path / "abi"
    source.write_text("\n".join([*lines, "}"]))
    subprocess.run([compiler, "-std=c++17", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    for line, (struct, numbers) in zip(printed, _C.dlpack_abi().items(), strict=True):
        assert struct in MEMBERS and tuple(int(n) for n in line.split()) == tuple(numbers), struct


def test_the_version_that_torch_publishes():
    capsule = torch.Tensor.__dlpack_c_exchange_api__
    assert "dlpack_exchange_api" in repr(capsule)
