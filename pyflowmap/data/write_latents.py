"""Encode a data set once, so that any autoencoder serves latent flow matching."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from ..files import whole_file
from .data_set import describe
from .shard import checksums, open_safetensors

__all__ = ["write_latents"]


def write_latents(
    data: Any,
    encode: Callable[[Tensor], Tensor],  # (B, ...) -> (B, C, ...), deterministic
    path: str | Path,
    *,
    batch: int = 64,
    shard: int = 8192,
    dtype: str = "float16",
    notes: Mapping[str, Any] | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> Path:
    """Write encode(x1) of every row of `data`, its label and its mask, as a store for `pfm.data.latents`.

        pfm.data.write_latents(pictures, lambda x: vae.encode(x.to("cuda")).latent_dist.mean, "latents")
        store = pfm.data.latents("latents", mean="stored", std="stored")

    Shard i holds the rows from i `shard` on in path/shard-00000i.safetensors, with a checksum per row and the mean and
    spread per channel. A shard is written whole or not at all; the same command again makes those that are missing or
    damaged, and refuses a folder of another configuration: rows, shard, dtype, and `notes`, any JSON that names the
    encoder, e.g. {"encoder": "sd-vae-ft-ema"}. It cannot see that the *function* changed; name it in `notes`.

    data   with a length; an endless set has no store
    batch  rows handed to `encode` at a time, on the CPU, without gradient
    dtype  stored: "float16" or "float32"
    rank, world   process `rank` of `world` writes the shards i = rank mod world
    """
    if not hasattr(data, "__len__"):
        raise TypeError(f"{type(data).__name__} is endless; a store holds a set with a length")
    if dtype not in ("float16", "float32"):
        raise ValueError(f'dtype = {dtype!r}; it is "float16" or "float32"')
    for name, value in (("batch", batch), ("shard", shard), ("world", world)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r}; a whole number, at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank = {rank}, world = {world}; a rank lies below world")
    rows, (_, labels, _) = len(data), describe(data)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    configuration = {"rows": rows, "shard": shard, "dtype": dtype, "notes": json.loads(json.dumps(dict(notes or {})))}
    starts: Any = range(rank * shard, rows, world * shard)
    if progress:
        from tqdm.auto import tqdm

        starts = tqdm(starts, desc="encoding", unit="shard")
    for first in starts:
        file = folder / f"shard-{first // shard:06d}.safetensors"
        if file.exists() and _whole(file, configuration):
            continue
        arrays = _encoded(data, encode, first, min(first + shard, rows), batch, dtype)
        n = len(arrays["latents"])
        values = arrays["latents"].astype(np.float64).reshape(n, arrays["latents"].shape[1], -1)
        mean = values.mean((0, 2))
        # Squares about the mean, summed over rows and averaged over a row's elements.
        spread = ((values - mean[:, None]) ** 2).mean(2).sum(0)
        noted = {"format": 1, "first": first, "rows": n, "of": rows, "labels": labels, "configuration": configuration}
        noted |= {"mean": mean.tolist(), "spread": spread.tolist()}
        with whole_file(file) as temporary:
            save_file({**arrays, "crc32": checksums(n, arrays)}, temporary, {"pyflowmap_latents": json.dumps(noted)})
    return folder


def _whole(file: Path, configuration: dict[str, Any]) -> bool:
    """Whether the shard is there and undamaged; raises ValueError where it is of another configuration."""
    try:
        found = open_safetensors(file)
        made = found.notes.get("configuration")
    except ValueError:
        return False
    if made != configuration:
        different = [key for key in configuration if not isinstance(made, dict) or made.get(key) != configuration[key]]
        was = {key: made.get(key) for key in different} if isinstance(made, dict) else "unknown"
        now = {key: configuration[key] for key in different}
        raise ValueError(
            f"{file} is of a store with {was}, this one has {now}; choose another folder or delete that one"
        )
    try:
        found.read(np.arange(found.rows), found.notes["first"])
    except ValueError:
        return False
    return True


def _encoded(
    data: Any, encode: Callable[[Tensor], Tensor], first: int, stop: int, batch: int, dtype: str
) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    for low in range(first, stop, batch):
        high = min(low + batch, stop)
        x1, condition = data.batch(np.arange(low, high))
        with torch.no_grad():
            z = encode(x1)
        if not isinstance(z, Tensor) or z.shape[:1] != (high - low,) or z.dim() < 2 or not z.is_floating_point():
            shown = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"encode gave {shown} for {high - low} rows; return floating-point latents (B, C, ...)")
        stored = z.detach().cpu().to(getattr(torch, dtype)).numpy()  # torch's cast: an overflow becomes infinity
        if not np.isfinite(stored).all():
            cure = ', pass dtype="float32"' if torch.isfinite(z).all() else "; look at the encoder or the data"
            raise ValueError(f"encode gave numbers for rows {low} to {high - 1} that are not finite in {dtype}{cure}")
        parts.setdefault("latents", []).append(stored)
        for key, name in (("label", "labels"), ("mask", "masks")):
            if key in condition:
                parts.setdefault(name, []).append(condition[key].cpu().numpy())
    shapes = {array.shape[1:] for array in parts["latents"]}
    if len(shapes) > 1:
        raise ValueError(f"encode gave latents of several shapes, {sorted(shapes)}; rows of one store have one")
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}
