"""The house keeps its shape: floors, stub, dependencies, instruction sets, and no torch inside the compiled core."""

import ast
import importlib.metadata
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import warnings

import pytest

import pyflowmap
from pyflowmap import _C

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KERNELS = re.search(r"set\(PYFLOWMAP_KERNELS ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()

# ---- floors ---------------------------------------------------------------------------------------------------------
# A room may import itself, any room on a lower floor and, on its own floor, any room further right: one direction, no
# way back. `""` is pyflowmap/__init__.py: the programs of floor 7 use the public names like anyone, nothing below does.
FLOORS = [
    (7, "__main__", "cli", "bench", "recipes", "", "integrations"),
    (6, "training", "editing", "likelihood", "sampling", "chunks", "graphs", "view", "arguments", "data"),
    (5, "coupling", "objectives", "solvers", "guidance", "weights", "times"),
    (4, "flow_map", "nn"),
    (3, "interpolants", "schedules", "tangents", "draws", "algebra", "combination"),
    (2, "installation", "ops", "reference", "png", "files"),
    (1, "_C", "_simt"),
]
ORDER = {name: (floor, -place) for floor, *rooms in FLOORS for place, name in enumerate(rooms)}
# Files that belong to a room without lying in its folder.
ROOM_OF = {"calls": "flow_map", "predictions": "flow_map", "checkpoint": "flow_map"}


def room(module: str) -> str:
    """The room of a dotted name: 'pyflowmap.ops.combine' lies in 'ops'."""
    name = [*module.split("."), ""][1]
    return ROOM_OF.get(name, name)


def imports(file: pathlib.Path) -> set[tuple[int, str]]:
    """(line, dotted name) of every module of ours that a file imports, wherever in the file."""
    inside = file.relative_to(ROOT).with_suffix("").parts
    package = inside if file.name == "__init__.py" else inside[:-1]
    package = tuple(part for part in package if part != "__init__")
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            if base == ["pyflowmap"]:  # from pyflowmap import algebra, lazy
                found |= {(node.lineno, f"pyflowmap.{alias.name}") for alias in node.names}
            else:
                found.add((node.lineno, ".".join(base)))
    return {(line, name) for line, name in found if name.split(".")[0] == "pyflowmap"}


def floor_faults(files) -> list[str]:
    faults = []
    for file in files:
        place = file.relative_to(ROOT)
        own = room(".".join(part for part in place.with_suffix("").parts if part != "__init__"))
        if own not in ORDER:
            faults.append(f"{place}: '{own}' has no floor; give it one in FLOORS")
            continue
        for line, name in imports(file):
            other = room(name)
            if other not in ORDER:  # a name, not a module: `from pyflowmap import lazy` reaches up to the roof
                other = ""
            if other != own and ORDER[other] >= ORDER[own]:
                faults.append(f"{place}:{line}: {own} (floor {ORDER[own][0]}) imports {name} (floor {ORDER[other][0]})")
    return sorted(faults)


def test_a_module_imports_only_floors_below_it():
    files = sorted((ROOT / "pyflowmap").rglob("*.py"))
    assert len(files) > 10
    assert floor_faults(files) == []


def test_the_floor_check_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "pyflowmap/ops").mkdir(parents=True)
    file = tmp_path / "pyflowmap/ops/bad.py"
    for line in (
        "import pyflowmap.algebra",
        "from pyflowmap import algebra",
        "from pyflowmap.algebra import lazy",
        "from ..algebra import lazy",
        "from .. import algebra",
        "from pyflowmap import lazy",
        "def f():\n    import pyflowmap.solvers.heun",
    ):
        file.write_text(line)
        assert len(floor_faults([file])) == 1, line
    for line in ("from .. import _C", "from . import other", "from pyflowmap.ops import x", "import torch"):
        file.write_text(line)
        assert floor_faults([file]) == [], line


# ---- the stub -------------------------------------------------------------------------------------------------------
def parameters(node: ast.FunctionDef) -> list[tuple[str, bool]]:
    """(name, has a default) of every parameter."""
    a = node.args
    positional = a.posonlyargs + a.args
    required = len(positional) - len(a.defaults)
    return [(p.arg, i >= required) for i, p in enumerate(positional)] + [
        (p.arg, default is not None) for p, default in zip(a.kwonlyargs, a.kw_defaults)
    ]


def test_the_stub_names_what_the_module_has():
    tree = ast.parse((ROOT / "pyflowmap/_C.pyi").read_text())
    stub = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    stub |= {node.target.id: node for node in tree.body if isinstance(node, ast.AnnAssign)}
    module = {name for name in dir(_C) if not name.startswith("__")}
    assert set(stub) == module

    for name, node in stub.items():
        if not isinstance(node, ast.FunctionDef):
            continue
        signature = re.match(r"(\w+\(.*?\)) ->", getattr(_C, name).__doc__, re.DOTALL)
        assert signature, f"the docstring of _C.{name} does not open with its signature"
        declared = ast.parse(f"def {signature[1]}: ...").body[0]
        assert parameters(node) == parameters(declared), f"_C.{name}"


# ---- dependencies ---------------------------------------------------------------------------------------------------
def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_run_time_dependencies_are_four():
    assert {name_of(line) for line in PYPROJECT["project"]["dependencies"]} == {"torch", "numpy", "safetensors", "tqdm"}
    installed = [line for line in importlib.metadata.requires("pyflowmap") if "extra ==" not in line]
    assert {name_of(line) for line in installed} == {"torch", "numpy", "safetensors", "tqdm"}


def test_what_ci_installs_is_pinned():
    pinned = {
        name_of(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    }
    extras = PYPROJECT["project"]["optional-dependencies"]
    asked = {name_of(line) for lines in extras.values() for line in lines} - {"pyflowmap", "tomli"}
    asked |= {name_of(line) for line in PYPROJECT["project"]["dependencies"]}
    assert asked - pinned == set()


def test_import_needs_no_extra_and_shares_the_threads_of_torch():
    code = """
import pathlib, sys
import pyflowmap
extras = {"matplotlib", "mlxtend", "sklearn", "scipy", "tyro", "rich", "diffusers", "pandas", "ot", "hypothesis"}
print(sorted(extras & set(sys.modules)))
maps = pathlib.Path("/proc/self/maps")
lines = maps.read_text().splitlines() if maps.exists() else []
print(len({line.split()[-1] for line in lines if "libgomp" in line}) <= 1)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "True"]


# ---- the compiled core ----------------------------------------------------------------------------------------------
def test_no_torch_inside_the_core():
    # In pieces, so that this file does not hold what it looks for.
    words = ["ATen" + "/", "torch" + "/extension", "find_package" + "(Torch"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = [ROOT / line for line in listed.stdout.splitlines()] if listed.returncode == 0 else []
    files = files or [*ROOT.glob("csrc/**/*"), *ROOT.glob("cmake/*"), ROOT / "CMakeLists.txt"]
    texts = [file for file in files if file.is_file() and file.suffix not in {".png", ".safetensors", ".gz"}]
    assert any(file.suffix == ".cu" for file in texts)
    found = [
        f"{file.relative_to(ROOT)}: {word}"
        for file in texts
        for word in words
        if word in file.read_text(errors="replace")
    ]
    assert found == []


def objdump(*arguments: str) -> str:
    if not shutil.which("objdump"):
        pytest.skip("no objdump on this machine")
    return subprocess.run(["objdump", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_module_links_neither_torch_nor_the_cuda_run_time():
    needed = re.findall(r"NEEDED\s+(\S+)", objdump("-p", _C.__file__))
    assert needed
    assert [name for name in needed if re.match(r"lib(torch|c10|cuda)", name)] == []
    assert "RUNPATH" not in objdump("-p", _C.__file__)


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="the instruction sets of x86-64")
def test_each_kernel_uses_its_instruction_set_and_no_other_function_does():
    """A loop that silently stays scalar is slow; an inline function compiled for v4 and merged into the rest of the
    module by the linker stops an older processor. The registers in the machine code show both."""
    users = {"ymm": set(), "zmm": set()}
    function = ""
    for line in objdump("-d", "--no-show-raw-insn", _C.__file__).splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1][:-2]
        elif "%zmm" in line:
            users["zmm"].add(function)
        elif "%ymm" in line:
            users["ymm"].add(function)
    if not any("9pyflowmap2v4" in name for name in users["zmm"]):
        assert _C.build()["best_isa"] != "v4", "this build has v4 clones, but no function of them uses zmm"
        pytest.skip("the compiler of this build has no x86-64-v4")
    for kernel in KERNELS:
        word = "".join(part.title() for part in kernel.split("_"))
        for isa, register in (("v3", "ymm"), ("v4", "zmm")):
            clones = [name for name in users[register] if f"9pyflowmap2{isa}" in name and word in name]
            assert clones, f"no {isa} clone of {kernel} uses {register}"
    ours = {register: {name for name in names if not is_cudart(name)} for register, names in users.items()}
    assert {name for name in ours["zmm"] if "9pyflowmap2v4" not in name} == set()
    assert {name for name in ours["ymm"] if not re.search("9pyflowmap2v[34]", name)} == set()


def is_cudart(name: str) -> bool:
    """The static CUDA run time brings its own code, which asks the processor first."""
    return (
        bool(_C.build()["cuda"]) and "pyflowmap" not in name and "pybind11" not in name and not name.startswith("_ZNSt")
    )


def test_a_kernel_is_one_word_everywhere():
    folders = {file.parent.name for file in ROOT.glob("csrc/*/*.cu")}
    assert folders == set(KERNELS)
    for kernel in KERNELS:
        for file in (
            *(f"csrc/{kernel}/{kernel}{end}" for end in (".h", ".cpp", "_isa.cpp", ".cu")),
            f"csrc/bindings/{kernel}.cpp",
            f"pyflowmap/ops/{kernel}.py",
        ):
            assert (ROOT / file).is_file(), file
        assert hasattr(_C, kernel)
        assert hasattr(pyflowmap.reference, kernel)


# ---- the rest -------------------------------------------------------------------------------------------------------
def test_one_version():
    version = PYPROJECT["project"]["version"]
    assert pyflowmap.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == version


def test_files_are_short():
    """Not a law: a list to look at. A file beyond 400 lines is asked whether it is still one idea."""
    sources = [*ROOT.glob("pyflowmap/**/*.py"), *(f for f in ROOT.glob("csrc/**/*") if f.is_file())]
    counts = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in sources}
    long = {name: count for name, count in sorted(counts.items()) if count > 400}
    if long:
        warnings.warn(f"over 400 lines: {long}", stacklevel=1)
    assert max(counts.values()) < 800, long
