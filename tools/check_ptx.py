"""Compiles the exact kernels' .cu to PTX and refuses fused multiply-adds: noise is the same on every back end only so.

The CPU back end is compiled with -ffp-contract=off and the emulator cannot see what nvcc contracts, so it is read here.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ["-ptx", "-std=c++17", "-O3", "-fmad=false", "-arch=compute_80", "-DPYFLOWMAP_CUDA=1", f"-I{ROOT / 'csrc'}"]


def main() -> int:
    failures = []
    exact = re.search(r"set\(PYFLOWMAP_EXACT_KERNELS ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    sources = [file for kernel in exact[1].split() for file in sorted(ROOT.glob(f"csrc/{kernel}/*.cu"))]
    for source in sources:
        ptx = subprocess.run(
            ["nvcc", *FLAGS, "-o", "-", str(source)], check=True, capture_output=True, text=True
        ).stdout
        fused = re.findall(r"^\s*(fma\.\S+ .*)$", ptx, re.MULTILINE)
        kernels = len(re.findall(r"\.entry ", ptx))
        print(f"{source.relative_to(ROOT)}: {kernels} kernels, {len(fused)} fused multiply-adds")
        if fused:
            failures.append(f"{source.relative_to(ROOT)}: for example `{fused[0]}`")
        if not kernels:
            failures.append(f"{source.relative_to(ROOT)}: no kernel in its PTX")
    if not sources:
        failures.append("no .cu file of an exact kernel under csrc/")
    for failure in failures:
        print(f"check_ptx: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
