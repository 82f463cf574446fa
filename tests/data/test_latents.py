"""The latent store: what is read is what was written, and every way of being damaged is named."""

import builtins
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pyflowmap.data import Stream, latents, write_latents


class Pictures:
    """Row i: three channels of normal numbers with deviations 1, 2, 3 about means 0, 5, -5; class i mod 4; a mask."""

    shape, labels, mask_shape = (3, 4, 4), 4, (1, 4, 4)

    def __init__(self, rows=50):
        z = np.random.default_rng(0).standard_normal((rows, 3, 4, 4))
        scale, shift = np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, -5.0])
        self.x = torch.from_numpy((z * scale[:, None, None] + shift[:, None, None]).astype(np.float32))

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        rows = torch.from_numpy(indices)
        mask = (self.x[rows, :1] > 0).to(torch.uint8)
        return self.x[rows], {"label": rows % 4, "mask": mask}


def encode(x):
    return 2.0 * x[:, :, ::2]


@pytest.fixture
def store(tmp_path):
    return write_latents(Pictures(), encode, tmp_path / "store", batch=7, shard=20, dtype="float32")


def test_what_is_read_is_what_was_encoded(store):
    assert [p.name for p in sorted(store.iterdir())] == [f"shard-{k:06d}.safetensors" for k in range(3)]
    data, pictures = latents(store), Pictures()
    assert (len(data), data.shape, data.labels, data.mask_shape) == (50, (3, 2, 4), 4, (1, 4, 4))
    rows = np.array([49, 0, 19, 20, 21, 0])
    x1, condition = data.batch(rows)
    expected, given = pictures.batch(rows)
    assert torch.equal(x1, encode(expected))
    assert torch.equal(condition["label"], given["label"]) and torch.equal(condition["mask"], given["mask"].float())
    assert latents(store, labels=False, masks=False).batch(rows)[1] == {}
    assert latents(store, labels=False).batch(rows)[1].keys() == {"mask"}


def test_stored_mean_and_deviation_are_those_of_all_rows(store):
    data = latents(store, mean="stored", std="stored")
    z = encode(Pictures().x).double()
    mean, std = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0).sqrt()
    assert np.allclose(data.mean.ravel(), mean, rtol=1e-6, atol=1e-6) and np.allclose(data.std.ravel(), std, rtol=1e-6)
    x1, _ = data.batch(np.arange(50))
    assert torch.allclose(x1.double(), (z - mean[:, None, None]) / std[:, None, None], atol=1e-5)
    assert torch.allclose(data.restore(x1).double(), z, atol=1e-5)
    by_hand = latents(store, mean=[1.0, 2.0, 3.0], std=0.5).batch(np.array([3]))[0]
    assert torch.allclose(by_hand[0, 1].double(), (z[3, 1] - 2.0) / 0.5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_safetensors_file_of_any_writer(tmp_path, dtype):
    z = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"latents": z, "labels": torch.arange(9, dtype=torch.int32)}, tmp_path / "x.safetensors")
    data = latents(tmp_path / "x.safetensors")
    x1, condition = data.batch(np.array([8, 1]))
    assert x1.dtype == torch.float32 and torch.equal(x1, z[[8, 1]].float()) and data.labels == 9
    assert condition["label"].tolist() == [8, 1] and condition["label"].dtype == torch.int64


def test_npy_files(tmp_path):
    z = np.random.default_rng(0).standard_normal((10, 2, 3)).astype(np.float32)
    np.save(tmp_path / "alone.npy", z)
    assert np.array_equal(latents(tmp_path / "alone.npy").batch(np.array([9, 0]))[0], z[[9, 0]])
    for k in range(2):
        np.save(tmp_path / f"latents-{k}.npy", z[5 * k : 5 * k + 5])
        np.save(tmp_path / f"labels-{k}.npy", np.arange(5) + k)
        np.save(tmp_path / f"masks-{k}.npy", np.ones((5, 1, 3), bool))
    data = latents(tmp_path)
    x1, condition = data.batch(np.array([4, 5]))
    assert np.array_equal(x1, z[[4, 5]]) and condition["label"].tolist() == [4, 1] and data.labels == 6
    assert condition["mask"].shape == (2, 1, 3) and condition["mask"].dtype == torch.float32
    np.save(tmp_path / "latents-0.npy", np.array([{"a": 1}] * 5, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"latents-0\.npy is not a whole \.npy file of numbers"):
        latents(tmp_path)


class Bomb:
    def __reduce__(self):
        return exec, ("import builtins; builtins.went_off = True",)


def test_nothing_is_unpickled(tmp_path):
    for number, content in enumerate((pickle.dumps(Bomb()), pickle.dumps(np.ones((3, 2))))):
        (tmp_path / f"{number}.npy").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{number}\.npy is not a whole \.npy file of numbers"):
            latents(tmp_path / f"{number}.npy")
    assert not hasattr(builtins, "went_off")


def test_it_feeds_a_stream(store):
    stream = Stream(latents(store), 25, seed=2)
    seen = torch.cat([next(stream).x1 for _ in range(2)])
    assert torch.equal(seen.flatten(1).sort(0).values, encode(Pictures().x).flatten(1).sort(0).values)


# ---- damage -------------------------------------------------------------------------------------------------------
def flip(path, at, value=0xFF):
    data = bytearray(path.read_bytes())
    data[at] ^= value
    path.write_bytes(data)


def test_a_flipped_bit_is_found_when_its_row_is_read(store):
    path = store / "shard-000001.safetensors"
    clean, begin = latents(store), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    at = begin + json.loads(path.read_bytes()[8:begin])["latents"]["data_offsets"][0]
    row = 3 * 2 * 4 * 4
    clean.batch(np.arange(50))
    for damaged in (3, 5):
        flip(path, at + damaged * row + 2, 0x01)
    data = latents(store)  # as large as before: opening cannot know
    data.batch(np.array([0, 22, 24, 26]))
    with pytest.raises(
        ValueError, match=r"shard-000001.safetensors: rows 3 to 5 \(of the store 23 to 25\) are damaged"
    ):
        data.batch(np.arange(50))


def test_a_flipped_label_or_mask_is_found_too(store):
    path = store / "shard-000000.safetensors"
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:begin])
    for key, width in (("labels", 8), ("masks", 16)):
        at = begin + header[key]["data_offsets"][0] + 2 * width
        flip(path, at, 0x01)
        with pytest.raises(ValueError, match=r"rows 2 \(of the store 2\) are damaged: their checksums differ"):
            latents(store, masks=False).batch(np.arange(5))
        flip(path, at, 0x01)
    latents(store).batch(np.arange(20))


def test_numbers_that_are_not_finite_are_named_where_there_is_no_checksum(tmp_path):
    z = torch.ones(6, 2, 2)
    z[4, 1, 1] = torch.nan
    save_file({"latents": z}, tmp_path / "x.safetensors")
    data = latents(tmp_path / "x.safetensors")
    data.batch(np.array([0, 5]))
    with pytest.raises(ValueError, match=r"x.safetensors: rows 4 .*latents hold numbers that are not finite"):
        data.batch(np.array([5, 4]))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_shard_cut_off_is_found_when_the_store_is_opened(store, keep):
    path = store / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"shard-000001.safetensors is not a whole safetensors file"):
        latents(store)


def test_a_shard_that_shrinks_under_an_open_store_is_an_error_and_not_a_bus_error(store):
    data, path = latents(store), store / "shard-000002.safetensors"
    with open(path, "r+b") as file:
        file.truncate(500)
    data.batch(np.arange(40))
    with pytest.raises(ValueError, match=r"000002.safetensors has changed since it was opened; rows 1 to 9 are gone"):
        data.batch(np.arange(41, 50))


def test_a_missing_or_foreign_shard(store):
    (store / "shard-000001.safetensors").rename(store / "kept")
    with pytest.raises(ValueError, match=r"shard-000002.safetensors begins with row 40 of its store, but 20 rows"):
        latents(store)
    (store / "shard-000002.safetensors").unlink()
    with pytest.raises(ValueError, match="has 50 rows but only 20 are here"):
        latents(store)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"x": torch.ones(3, 2)}, 'no "latents"; it holds x'),
        ({"latents": torch.ones(3, dtype=torch.int64)}, "rows of at least one number"),
        ({"latents": torch.ones(3, 2, dtype=torch.int64)}, "latents are int64"),
        ({"latents": torch.ones(0, 2)}, r"shape \(0, 2\)"),
        ({"latents": torch.ones(3, 2), "labels": torch.zeros(2).long()}, "labels has 2 rows but latents have 3"),
        ({"latents": torch.ones(3, 2), "labels": torch.zeros(3)}, "labels are float32"),
        ({"latents": torch.ones(3, 2), "labels": torch.tensor([0, -1, 2])}, "row 1 has label -1"),
        ({"latents": torch.ones(3, 2), "labels": torch.tensor([0, 2**40, 2])}, "labels are damaged"),
    ],
)
def test_files_of_another_kind(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        latents(tmp_path / "x.safetensors")


def test_shards_of_two_kinds_and_paths_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither"):
        latents(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no store"):
        latents(tmp_path / "missing")
    save_file({"latents": torch.ones(3, 2)}, tmp_path / "a.safetensors")
    save_file({"latents": torch.ones(3, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="one store has one kind"):
        latents(tmp_path)
    with pytest.raises(ValueError, match="not written by write_latents"):
        latents(tmp_path / "a.safetensors", mean="stored")
    for options, message in (({"mean": [1.0, 2.0, 3.0]}, "each of the 2 channels"), ({"std": 0.0}, "std = 0.0")):
        with pytest.raises(ValueError, match=message):
            latents(tmp_path / "a.safetensors", **options)


# ---- writing ------------------------------------------------------------------------------------------------------
class Counting:
    def __init__(self, fail_after=None):
        self.rows, self.fail_after = 0, fail_after

    def __call__(self, x):
        if self.fail_after is not None and self.rows >= self.fail_after:
            raise KeyboardInterrupt
        self.rows += len(x)
        return encode(x)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path, store):
    first, second = Counting(fail_after=30), Counting()
    options = {"batch": 7, "shard": 20, "dtype": "float32"}
    with pytest.raises(KeyboardInterrupt):
        write_latents(Pictures(), first, tmp_path / "again", **options)
    assert [p.name for p in (tmp_path / "again").iterdir()] == ["shard-000000.safetensors"]  # nothing half-written
    write_latents(Pictures(), second, tmp_path / "again", **options)
    assert second.rows == 30 and files(tmp_path / "again") == files(store)


def test_a_damaged_shard_is_made_again(store):
    whole, counting = files(store), Counting()
    flip(store / "shard-000001.safetensors", len(whole["shard-000001.safetensors"]) - 5)
    (store / "shard-000002.safetensors").write_bytes(b"short")
    write_latents(Pictures(), counting, store, batch=7, shard=20, dtype="float32")
    assert counting.rows == 30 and files(store) == whole


def test_processes_share_the_shards(tmp_path, store):
    for rank in (1, 0):
        write_latents(Pictures(), encode, tmp_path / "two", batch=7, shard=20, dtype="float32", rank=rank, world=2)
        assert len(files(tmp_path / "two")) == (1 if rank else 3)
    assert files(tmp_path / "two") == files(store)


def test_another_configuration_is_refused_by_name(tmp_path, store):
    with pytest.raises(ValueError, match=r"store with \{'dtype': 'float32'\}, this one has \{'dtype': 'float16'\}"):
        write_latents(Pictures(), encode, store, shard=20)
    with pytest.raises(ValueError, match=r"'notes': \{'encoder': 'b'\}"):
        write_latents(Pictures(), encode, store, shard=20, dtype="float32", notes={"encoder": "b"})


@pytest.mark.parametrize(
    "encoder, message",
    [
        (lambda x: x[:1], "for 7 rows"),
        (lambda x: None, "NoneType"),
        (lambda x: x.long(), "torch.int64"),
        (lambda x: x * 1e5, 'not finite in float16, pass dtype="float32"'),
        (lambda x: x * torch.nan, "look at the encoder"),
    ],
)
def test_encoders_that_do_not_fit(tmp_path, encoder, message):
    with pytest.raises(ValueError, match=message):
        write_latents(Pictures(), encoder, tmp_path / "s", batch=7)
    assert list((tmp_path / "s").iterdir()) == []
