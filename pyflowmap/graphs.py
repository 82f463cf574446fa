"""CUDA graphs of a whole `sample`: captured at the first call, replayed at every later one like it.

What may differ between calls is copied into tensors that the graph reads: the noise, the condition's tensors, the seed
and the sample ids (so replays draw different noise). All else is the key of the capture:

    shape, dtype, memory format and device of noise and condition, the condition's plain values
    model: prediction, call, interpolant; the network's modes (train or eval) and the addresses of its parameters
    times, solver with options, guidance with options, dtype, trajectory
    autocast and the precision of float32 matrix products

Objects and functions are compared by identity, dataclasses and guidances by their fields. New values in the same
parameters (an optimiser's step) are seen by the replay; a parameter that moved makes a new capture. So does nothing
else: a network that is a function keeps what its Python did at the first call, except for the modules that it holds in
its closure, its arguments bound by `functools.partial`, or its `self`.

At most `Graphs.size` captures are kept, the least recently used goes first; those of a network that is gone go with it.
Each holds its own memory, about that of one run.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .guidance import Guidance
from .solvers import Solver
from .solvers.driver import finite

__all__ = ["Capturer", "Cuda", "Graphs", "check", "clear", "default"]


class Capturer(Protocol):
    """What can make a function replayable."""

    def refuses(self, like: Tensor) -> str | None:
        """Why it cannot work with such a state; None where it can."""

    def capture(self, function: Callable[[], Tensor], device: torch.device) -> Replay:
        """Run `function`; return what updates the tensors that it reads, runs it again and copies its result."""


Replay = Callable[[Callable[[], None]], Tensor]


class Cuda:
    """torch.cuda.CUDAGraph, warmed up on a side stream."""

    def refuses(self, like: Tensor) -> str | None:
        if not (torch.cuda.is_available() and like.is_cuda):
            return f"cuda_graph=True needs a CUDA device, the noise is on {like.device}; leave it out on the CPU"
        if torch.cuda.is_current_stream_capturing():
            return "cuda_graph=True inside another capture; leave it out, sample can be captured as it is"
        return None

    def capture(self, function: Callable[[], Tensor], device: torch.device) -> Replay:
        with torch.cuda.device(device):
            side, here = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(2):  # the first allocates and tunes, the second is what the graph will be
                    function()
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=side):
                    result = function()
            except RuntimeError as error:
                raise RuntimeError(
                    f"the run cannot be captured ({str(error).splitlines()[0]}); the network and the guidance must not "
                    "wait for the device (.item(), printing) nor copy from the CPU; or leave cuda_graph out"
                ) from error
            done = torch.cuda.Event()
            done.record()

        def replay(update: Callable[[], None]) -> Tensor:
            with torch.cuda.device(device):
                torch.cuda.current_stream().wait_event(done)  # another stream may be using the same tensors
                update()
                graph.replay()
                copy = result.clone()
                done.record()
            return copy

        return replay


@dataclass
class _Entry:
    inputs: dict[str, Tensor]
    replay: Replay
    alive: list[weakref.ref]  # what the key names by identity: an entry outlived by one of them is void
    kept: list[Any]  # the same, of what cannot be referred to weakly, and tensors that the graph reads


class Graphs:
    """The captures, and the verb that uses them."""

    size = 8

    def __init__(self, capturer: Capturer) -> None:
        self.capturer = capturer
        self.entries: OrderedDict[Any, _Entry] = OrderedDict()
        self.lock = threading.RLock()

    def clear(self) -> None:
        """Give their memory back."""
        with self.lock:
            self.entries.clear()

    def check(self, solver: Solver, like: Tensor) -> None:
        """Raise ValueError for what cannot be captured."""
        refusal = self.capturer.refuses(like)
        if refusal is not None:
            raise ValueError(refusal)
        if solver.loop is not None:
            raise ValueError(f"cuda_graph=True repeats the same steps, {solver.name} chooses them; leave one out")

    def __call__(
        self,
        run: functools.partial,  # of sampling._run: model, solver, grid; seed, dtype, trajectory
        x: Tensor,
        condition: Mapping[str, Any],
        guidance: Guidance | None,
        sample_ids: Tensor | None,
        *,
        drawn: bool,
        on_nan: str,
    ) -> Tensor:
        model, seed = run.args[0], run.keywords["seed"]
        alive: list[Any] = []
        kept: list[Any] = []
        parts = (
            _identity(model.network, alive, kept),
            _key((model.prediction, model.call, model.interpolant), alive, kept),
            _key((run.args[1:], {**run.keywords, "seed": seed is None}), alive, kept),
            _key({k: _shape(v) if isinstance(v, Tensor) else v for k, v in condition.items()}, alive, kept),
            _key(guidance, alive, kept),
            (drawn, sample_ids is None, _shape(x)),
            _modes(x.device.type),
        )
        modules = {id(each): each for each in (*_modules(model.network), *alive) if isinstance(each, nn.Module)}
        key = (parts, tuple(_state(each) for each in modules.values()))
        now = {f"condition {k}": v for k, v in condition.items() if isinstance(v, Tensor)}
        now |= {} if drawn else {"x": x}
        now |= {} if sample_ids is None else {"ids": sample_ids}
        with self.lock:
            self._drop_dead()
            entry = self.entries.get(key)
            if entry is None:
                arguments = (x, condition, guidance, sample_ids)
                inputs, replay, table = self._capture(run, now, seed, arguments, drawn)
                entry = _Entry(inputs, replay, [weakref.ref(each) for each in alive], [*kept, table])
                self.entries[key] = entry
                while len(self.entries) > self.size:
                    self.entries.popitem(last=False)
            self.entries.move_to_end(key)

            def update() -> None:
                for name, value in now.items():
                    entry.inputs[name].copy_(value)
                if seed is not None:
                    _set(entry.inputs["seed"], seed)

            with torch.no_grad():
                result = entry.replay(update)
        if not finite(result[-1] if run.keywords["trajectory"] else result):
            return run(x, condition, guidance, sample_ids, drawn=drawn, on_nan=on_nan)  # it knows how to say where
        return result

    def _capture(self, run, now, seed, arguments, drawn) -> tuple[dict[str, Tensor], Replay, dict]:
        x, condition, guidance, _ = arguments
        inputs = {name: torch.empty_like(value).copy_(value) for name, value in now.items()}
        if seed is not None:
            inputs["seed"] = _set(torch.zeros((), dtype=torch.int64, device=x.device), seed)
        static = {k: inputs.get(f"condition {k}", v) for k, v in condition.items()}
        table: dict[Any, Tensor] = {}  # of times: made by the warm-up, since a capture cannot copy from the CPU
        again = functools.partial(
            run,
            *(inputs.get("x", x), static, guidance, inputs.get("ids")),
            drawn=drawn,
            seed=inputs.get("seed"),
            on_nan="keep",  # the replay's result is looked at, not this one's
            times_on_device=table,
        )
        kind = x.device.type
        # A cast that autocast's cache remembers from outside the graph would be freed under it.
        cast = torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with torch.no_grad(), cast, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            replay = self.capturer.capture(again, x.device)
        return inputs, replay, table

    def _drop_dead(self) -> None:
        for key in [k for k, entry in self.entries.items() if any(ref() is None for ref in entry.alive)]:
            del self.entries[key]


# ---- keys ------------------------------------------------------------------------------------------------------------


def _identity(value: Any, alive: list[Any], kept: list[Any]) -> Any:
    """A name for this very object. It is held weakly, or kept, so that no other takes its id."""
    try:
        weakref.ref(value)
        if hasattr(value, "__self__"):  # a bound method is made anew at every access
            return ("method", _identity(value.__self__, alive, kept), _identity(value.__func__, alive, kept))
        alive.append(value)
    except (TypeError, AttributeError):
        kept.append(value)
    return ("object", id(value))


def _key(value: Any, alive: list[Any], kept: list[Any]) -> Any:
    """`value` as something hashable that is equal only where a capture with the one serves the other."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return (type(value), repr(value) if isinstance(value, float) else value)
    if isinstance(value, Tensor):
        kept.append(value)
        return ("tensor", id(value), value.data_ptr(), *_shape(value))
    if isinstance(value, Mapping):
        return (type(value), tuple((k, _key(v, alive, kept)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_key(each, alive, kept) for each in value))
    if isinstance(value, functools.partial):
        return ("partial", _key((value.func, value.args, value.keywords), alive, kept))
    if (
        hasattr(value, "__dict__")
        and not isinstance(value, type)
        and (isinstance(value, Guidance) or is_dataclass(value))
    ):
        return (type(value), _key(dict(vars(value)), alive, kept))
    return _identity(value, alive, kept)


def _shape(x: Tensor) -> tuple:
    return (tuple(x.shape), x.stride(), x.dtype, x.device)


def _state(module: nn.Module) -> tuple:
    """Where its numbers are, and in which mode it is."""
    numbers = tuple((p.data_ptr(), p.dtype, p.device) for p in (*module.parameters(), *module.buffers()))
    return numbers, tuple(each.training for each in module.modules())


def _modules(network: Any, depth: int = 3) -> Iterator[nn.Module]:
    """The modules that a network is, or holds where one can see it."""
    if isinstance(network, nn.Module):
        yield network
        return
    if depth == 0:
        return
    held = [getattr(network, "__self__", None), getattr(network, "func", None)]
    held += [*getattr(network, "args", ()), *getattr(network, "keywords", {}).values()]
    for cell in getattr(network, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    for each in held:
        if isinstance(each, nn.Module) or callable(each):
            yield from _modules(each, depth - 1)


def _modes(kind: str) -> tuple:
    autocast = torch.is_autocast_enabled(kind)
    return autocast, torch.get_autocast_dtype(kind) if autocast else None, torch.get_float32_matmul_precision()


def _set(cell: Tensor, seed: int | Tensor) -> Tensor:
    if isinstance(seed, Tensor):
        return cell.copy_(seed.reshape(()))
    return cell.fill_(seed if seed < 2**63 else seed - 2**64)  # the same 64 bits


_graphs = Graphs(Cuda())
check, default, clear = _graphs.check, _graphs.__call__, _graphs.clear
