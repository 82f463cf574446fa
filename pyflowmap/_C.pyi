# The compiled module. Its functions check without words: pyflowmap.ops is the door. tests/test_packaging.py compares
# the names and parameters here with the module's own.
from typing import Any

from torch import Tensor

_Coefficient = float | Tensor | tuple[float, Tensor | None]  # a number times an optional number per row
_Rows = tuple[tuple[_Coefficient, ...], ...]  # one row per output, one column per input (and one for the noise)

def combine(
    inputs: tuple[Tensor, ...],
    coefficients: _Rows,
    outputs: tuple[Tensor | None, ...],
    leading: int,
    trusted: bool,
    noise: tuple[int, Tensor | None, int, Tensor | None, Tensor | None, int] | None = None,
    mask: tuple[Tensor, _Rows] | None = None,
    clamp: tuple[tuple[float, float] | None, ...] | None = None,
    gram: Tensor | None = None,
    cross: Tensor | None = None,
    sums: Tensor | None = None,
    like: Tensor | None = None,
    dtype: Any = None,
    store: Any = None,
    /,
) -> bool: ...
def update(combinations: tuple[Any, ...], out: Tensor | tuple[Tensor, ...], /) -> bool: ...
def sum_of(a: Any, b: Any, factor: float, /) -> tuple[Any, Any, Any] | None: ...
def attention_forward(tensors: tuple[Tensor | None, ...], scale: float, causal: bool, /) -> bool: ...
def attention_backward(tensors: tuple[Tensor | None, ...], scale: float, causal: bool, /) -> bool: ...
def version_of(tensor: Tensor, /) -> int | None: ...
def connect(objects: dict[str, Any]) -> None: ...
def build() -> dict[str, Any]: ...
def dlpack_abi() -> dict[str, tuple[int, ...]]: ...
def set_isa(name: str) -> None: ...
