"""Runs in a bare environment, outside the repository: does the installed wheel stand on its own?"""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

import torch

import pyflowmap as pfm

RUNTIME = {"torch", "numpy", "safetensors", "tqdm"}


def check(fact: bool, words: str) -> None:
    print(("ok    " if fact else "WRONG ") + words)
    if not fact:
        sys.exit(1)


def loaded(word: str) -> set[str]:
    """The files mapped into this process whose name contains `word`."""
    maps = pathlib.Path("/proc/self/maps")
    return set(re.findall(rf"(/\S*{word}\S*)", maps.read_text())) if maps.exists() else set()


def main() -> None:
    package = pathlib.Path(pfm.__file__).parent
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {package}")
    print(pfm.build_config())

    # the wheel's content
    files = importlib.metadata.files("pyflowmap") or []
    names = [file.name for file in files]
    cores = [pathlib.Path(file.locate()) for file in files if file.name.startswith("_C.") and file.suffix == ".so"]
    check(len(cores) == 1, "one compiled module")
    check(not any(name.startswith("_simt") for name in names), "the emulator is left out")
    check("py.typed" in names and "_C.pyi" in names, "py.typed and the stub are in")
    check(not any("libgomp" in name for name in names), "libgomp is left to torch")
    check(any(file.parts[-2] == "pretrained" and file.suffix == ".safetensors" for file in files), "a model is in")
    requires = importlib.metadata.requires("pyflowmap") or []
    runtime = {re.split(r"[^\w-]", line)[0] for line in requires if "extra ==" not in line}
    check(runtime == RUNTIME, f"run-time dependencies are {sorted(runtime)}")

    # what the module links, where a tool can tell
    try:
        dynamic = subprocess.run(["objdump", "-p", str(cores[0])], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"NEEDED\s+(\S+)", dynamic)
        check(not any(re.match(r"lib(torch|c10|cudart|cuda)\b", name) for name in needed), f"it links {needed}")
    except FileNotFoundError:
        print("      (no objdump: what the module links was not read)")

    # one update and one normal field through the kernel
    x, v = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    y = pfm.evaluate(pfm.lazy(x) + 0.25 * pfm.lazy(v))
    check(torch.allclose(y, x + 0.25 * v, rtol=1e-6, atol=1e-6), "x + h v through the kernel")
    z = pfm.evaluate(pfm.noise(torch.empty(1000, 64), seed=1))
    check(abs(z.mean().item()) < 0.02 and abs(z.std().item() - 1) < 0.02, "noise has mean 0 and deviation 1")
    big = torch.ones(64, 65536)
    pfm.evaluate(pfm.lazy(big) * 2.0, out=big)  # large enough for several threads
    check(bool((big == 2).all()), "a threaded update in place")
    gomp = {path for path in loaded("libgomp") if "pyflowmap" in path or "torch" in path}
    check(not any("pyflowmap" in path for path in gomp), f"OpenMP is torch's: {sorted(gomp)}")


if __name__ == "__main__":
    main()
