"""Writes docs/kernels.md: what the assembler gives every device kernel, for two architectures. Needs nvcc, no GPU.

python tools/ptxas_table.py [nvcc flags, such as -DPYFLOWMAP_MINIMAL=1]
"""

from __future__ import annotations

import concurrent.futures
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHS = ("sm_80", "sm_90a")
HEAD = """# Device kernels

Written by `python tools/ptxas_table.py` from `-Xptxas -v` of nvcc {version}. Spills are bytes stored + loaded by the
instructions of one thread; shared memory is what the kernel declares, beside which a launch may ask for more; constant
memory holds the arguments. {archs} stand side by side.

What spills, and why: attention forward, float32 with a tangent at 128 channels (16 keys to a tile are the fewest that a
product takes, and both accumulators are 128 wide); attention backward through both over keys, 16 bits at 64 channels
(two blocks to a multiprocessor leave a thread 128 registers: a few bytes spilled cost less than the second block is
worth) and float32 at 256. Nothing else does.
"""


class Usage(NamedTuple):
    registers: int
    spills: int
    shared: int
    constant: int


def exact_kernels() -> set[str]:
    """Those that are compiled without fused multiply-adds."""
    found = re.search(r"set\(PYFLOWMAP_EXACT_KERNELS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    return set(found[1].split()) if found else set()


def parse(log: str) -> dict[str, Usage]:
    """Mangled name -> usage, from what ptxas says about each entry function."""
    usages = {}
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name = re.match(r"'(\w+)'", part)
        number = lambda pattern, text=part: int((re.search(pattern, text) or "00")[1])  # noqa: E731
        if name is None or "Used" not in part:
            raise SystemExit(f"ptxas_table: cannot read what ptxas says: {part[:200]!r}")
        usages[name[1]] = Usage(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes smem"),
            number(r"(\d+) bytes cmem\[0\]"),
        )
    return usages


def compiled(source: pathlib.Path, arch: str, flags: list[str]) -> dict[str, Usage]:
    exact = ["-fmad=false"] if source.parent.name in exact_kernels() else []
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-DPYFLOWMAP_CUDA=1"]
        command += [f"-I{ROOT / 'csrc'}", *exact, *flags, "-o", f"{folder}/x.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ptxas_table: {source} for {arch}:\n{done.stderr}")
    return parse(done.stderr + done.stdout)


def short(mangled: list[str]) -> list[str]:
    """kernel<Config<bf16, 64, ...>>: without namespaces, arguments and the types of template values."""
    if not mangled:
        return []
    demangler = shutil.which("cu++filt") or "c++filt"  # not every toolkit has its own
    text = subprocess.run([demangler, "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = []
    for name in text.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\b\w+::", "", name)
        name = name.replace("(bool)1", "true").replace("(bool)0", "false")
        name = re.sub(r"\((?:unsigned )?(?:int|long|short|char)\)", "", name)
        name = re.sub(r"\((\w+)\)(\d+)", r"\1 \2", name)  # a value of an enumeration
        name = re.sub(r"^void ", "", name).replace(" >", ">").strip()
        names.append(name)
    return names


def main() -> int:
    sources, flags = sorted(ROOT.glob("csrc/*/*.cu")), sys.argv[1:]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    lines = [HEAD.format(version=release[1] if release else "?", archs=" and ".join(ARCHS))]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        work = {(s, a): pool.submit(compiled, s, a, flags) for s in sources for a in ARCHS}
    for source in sources:
        usages = [work[source, arch].result() for arch in ARCHS]
        if not usages[0]:
            continue
        lines.append(f"\n## {source.relative_to(ROOT)}\n")
        lines.append("| kernel | registers | spills, bytes | shared memory, bytes | constant memory, bytes |")
        lines.append("|---|---|---|---|---|")
        mangled = sorted(usages[0], reverse=True)
        for name, mark in sorted(zip(short(mangled), mangled, strict=True), key=lambda pair: natural(pair[0])):
            columns = [*zip(*(usage[mark] for usage in usages), strict=True)]
            columns[-1] = (max(columns[-1]),)  # ptxas does not say it for every architecture
            cells = [" / ".join(str(x) for x in (pair if len(set(pair)) > 1 else pair[:1])) for pair in columns]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    (ROOT / "docs" / "kernels.md").write_text("\n".join(lines) + "\n")
    return 0


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts 64 before 128."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", name)]


if __name__ == "__main__":
    sys.exit(main())
