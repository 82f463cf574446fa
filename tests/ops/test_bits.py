"""The same bits from any number of threads, any instruction set, and the CUDA source in the emulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from pyflowmap import _C, ops
from pyflowmap.ops import Noise
from pyflowmap.ops import backend as backends

ISAS = ("base", "v3", "v4")


def available() -> list[str]:
    return list(ISAS[: ISAS.index(_C.build()["best_isa"]) + 1])


def calls(small: bool = False):
    """(name, call): shapes on both sides of every seam (vectors of 16, chunks of 512, units of 16384, threads)."""
    rng = torch.Generator().manual_seed(0)
    for rows, columns in ((3, 37), (2, 530), (1, 16391)) + (() if small else ((5, 40000), (37, 9001))):
        draw = lambda dtype: torch.randn(rows, columns, generator=rng).to(dtype)  # noqa: B023, E731
        x, v, u = draw(torch.float32), draw(torch.bfloat16), draw(torch.float16)
        h = torch.randn(rows, generator=rng)
        mask = torch.randint(0, 2, (rows, columns), generator=rng).float()
        terms = ((1.0, (1 / 3, h), -0.7, 0.25), (h, 0.0, 1e-3, h))
        base = {"noise": Noise(9, 1), "dtype": (torch.float32, torch.bfloat16)}
        extra = {"mask": (mask, terms), "clamp": ((-1.0, 1.5), None)}
        sums = {"gram": True, "cross": True, "sums": True}
        shape = f"{rows}x{columns}"
        yield f"{shape} noise", (lambda a=(x, v, u), t=terms, o=base: ops.combine(a, t, **o))
        yield f"{shape} mask", (lambda a=(x, v, u), t=terms, o={**base, **extra}: ops.combine(a, t, **o))
        yield f"{shape} sums", (lambda a=(x, v, u), t=terms, o={**base, **sums}: ops.combine(a, t, **o))
        plain = tuple(row[:3] for row in terms)
        yield f"{shape} plain", (lambda a=(x, v, u), t=plain: ops.combine(a, t, dtype=torch.float16))
        wide = (x.double(), v.double(), u.double())
        yield f"{shape} f64", (lambda a=wide, t=plain, o=sums: ops.combine(a, t, **o))


def flat(result) -> list[torch.Tensor]:
    if isinstance(result, ops.Combined):
        return [*result.outputs, result.gram, result.cross, result.sums]
    return list(result)


def bits(result) -> list[bytes]:
    # -0.0 and 0.0 are different bits too, hence bytes and not torch.equal
    return [y.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for y in flat(result)]


def all_bits(small: bool = False) -> dict[str, list[bytes]]:
    return {name: bits(call()) for name, call in calls(small)}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def isa():
    before = _C.build()["isa"]
    yield _C.set_isa
    _C.set_isa(before)


def test_any_number_of_threads(threads):
    results = []
    for count in (1, 2, 4, 3):
        threads(count)
        results.append(all_bits())
    for other in results[1:]:
        assert other == results[0]


@pytest.mark.skipif(len(available()) < 2, reason="this machine or build has one instruction set only")
def test_any_instruction_set(isa):
    results = {}
    for name in available():
        isa(name)
        assert _C.build()["isa"] == name
        results[name] = all_bits()
    for name, result in results.items():
        wrong = [call for call in result if result[call] != results["base"][call]]
        assert not wrong, f"{name} differs from base in {wrong}"


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="v5"):
        _C.set_isa("v5")


def test_instruction_set_of_a_process():
    """PYFLOWMAP_ISA is read where the library loads; OMP_NUM_THREADS likewise."""
    program = (
        "import hashlib, json, torch; from pyflowmap import _C, ops\n"
        "x = torch.linspace(-3, 3, 40000).view(2, 20000)\n"
        "r = ops.combine((x,), ((0.3, 1.0),), noise=ops.Noise(1), gram=True)\n"
        "print(json.dumps([_C.build()['isa'], torch.get_num_threads(),"
        " *(hashlib.sha256(y.numpy().tobytes()).hexdigest() for y in (*r.outputs, r.gram))]))"
    )
    answers = []
    for name, count in ((available()[0], "1"), (available()[-1], "2")):
        environment = {**os.environ, "PYFLOWMAP_ISA": name, "OMP_NUM_THREADS": count}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        answers.append(json.loads(done.stdout))
        assert answers[-1][:2] == [name, int(count)]
    assert answers[0][2:] == answers[1][2:]


def test_emulated_cuda_kernel(simt):
    """Outputs and noise of the CUDA source are the CPU's, bit for bit; its sums are added in another order."""
    with backends.use("cpu"):
        cpu = {name: flat(call()) for name, call in calls(small=True)}
    with backends.use("simt"):
        cuda = {name: flat(call()) for name, call in calls(small=True)}
        again = {name: flat(call()) for name, call in calls(small=True)}
    for name in cpu:
        for k in range(2):
            assert bits([cpu[name][k]]) == bits([cuda[name][k]]), f"{name}, output {k}"
        for a, b, c in zip(cpu[name][2:], cuda[name][2:], again[name][2:], strict=True):
            assert torch.equal(b, c), f"{name}: two runs differ"
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(cpu[name][2].abs().max()))


def test_a_row_does_not_depend_on_its_batch(backend):
    """Reductions of a sample are the same bits alone and in a batch."""
    x = torch.randn(7, 20011, generator=torch.Generator().manual_seed(1)).to(backend.device)
    whole = ops.combine((x,), ((0.7,),), gram=True, sums=True)
    for row in (0, 3, 6):
        alone = ops.combine((x[row : row + 1],), ((0.7,),), gram=True, sums=True)
        assert torch.equal(alone.gram, whole.gram[row : row + 1]) and torch.equal(alone.sums, whole.sums[row : row + 1])
