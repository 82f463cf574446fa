"""A folder of pictures: classes, crops, orientation, and files that are not what they say."""

import struct
import zlib

import numpy as np
import pytest
import torch

from pyflowmap.data import image_folder

Image = pytest.importorskip("PIL.Image")


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def flat(value, h=8, w=8):
    return np.full((h, w, 3), value, np.uint8)


def test_classes_are_the_sorted_sub_folders_and_rows_the_sorted_files(tmp_path):
    for name, value in (
        ("b/2.png", 20),
        ("b/10.png", 10),
        ("a/deep/er/x.PNG", 30),
        ("c/y.bmp", 40),
        ("c/.hidden.png", 50),
    ):
        save(tmp_path / name, flat(value))
    (tmp_path / "c" / "notes.txt").write_text("not a picture")
    data = image_folder(tmp_path, 8)
    assert (len(data), data.labels, data.classes, data.shape) == (4, 3, ["a", "b", "c"], (3, 8, 8))
    x1, condition = data.batch(np.arange(4))
    assert condition["label"].tolist() == [0, 1, 1, 2] and x1.dtype == torch.float32
    expected = torch.tensor([30, 10, 20, 40]) / 127.5 - 1
    assert torch.allclose(x1, expected[:, None, None, None].expand_as(x1))
    assert x1.min() >= -1 and torch.equal(data.batch(np.array([2, 0]))[0], x1[[2, 0]])


def test_without_sub_folders_there_are_no_labels(tmp_path):
    save(tmp_path / "x.png", flat(255))
    data = image_folder(tmp_path, (4, 8), channels=1)
    x1, condition = data.batch(np.array([0]))
    assert condition == {} and data.labels == 0 and x1.shape == (1, 1, 4, 8) and (x1 == 1).all()


def test_the_centre_is_kept_and_the_aspect_too(tmp_path):
    pixels = np.zeros((8, 24, 3))
    pixels[:, 8:16] = 200  # the central square
    save(tmp_path / "wide.png", pixels)
    save(tmp_path / "tall.png", pixels.transpose(1, 0, 2))
    x1, _ = image_folder(tmp_path, 4).batch(np.arange(2))
    assert torch.allclose(x1, torch.tensor(200 / 127.5 - 1), atol=1e-6)
    wide, _ = image_folder(tmp_path, (4, 12)).batch(np.array([1]))
    assert torch.allclose(wide[0, :, :, 4:8], torch.tensor(200 / 127.5 - 1), atol=0.2) and wide[0, :, :, 0].max() < -0.9


def test_shrinking_averages_over_what_is_left_out(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255  # every other pixel: picking any of them would give black or white
    save(tmp_path / "fine.png", np.repeat(board[:, :, None], 3, 2))
    x1, _ = image_folder(tmp_path, 8).batch(np.array([0]))
    assert x1.abs().max() < 0.02


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # white above black
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show it
    image.save(tmp_path / "turned.png", exif=exif)
    x1, _ = image_folder(tmp_path, 8).batch(np.array([0]))
    assert (x1[0, :, :, 4:] == 1).all() and (x1[0, :, :, :4] == -1).all()  # above goes to the right


def test_what_is_transparent_is_white_and_grey_is_grey(tmp_path):
    see_through = np.zeros((8, 8, 4), np.uint8)
    save(tmp_path / "a.png", see_through)
    save(tmp_path / "b.png", np.full((8, 8), 51))
    Image.fromarray(np.full((8, 8), 51, np.uint8)).convert("P").save(tmp_path / "c.png")
    x1, _ = image_folder(tmp_path, 8).batch(np.arange(3))
    assert (x1[0] == 1).all() and torch.allclose(x1[1:], torch.tensor(51 / 127.5 - 1))


def header_only(width, height):
    """A PNG that says it is large, and holds nothing."""
    body = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated(tmp_path):
    save(tmp_path / "t.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    return (tmp_path / "t.png").read_bytes()[:3000]


@pytest.mark.parametrize(
    "content, why",
    [
        (lambda p: b"", "cannot identify"),
        (lambda p: b"hello", "cannot identify"),
        (truncated, "truncated|broken|unexpected|chunk|Truncated"),
        (lambda p: header_only(9000, 9000), "9000 x 9000 pixels are more than max_pixels = 64000000"),
        (lambda p: header_only(60000, 60000), "exceeds limit"),
    ],
)
def test_a_damaged_picture_is_named_or_skipped_and_counted(tmp_path, content, why):
    folder = tmp_path / "set"
    for k in range(3):
        save(folder / f"{k}.png", flat(100 + k))
    (folder / "1.png").write_bytes(content(tmp_path))
    data = image_folder(folder, 8)
    with pytest.raises(ValueError, match=rf"1\.png cannot be read \(.*({why})") as error:
        data.batch(np.arange(3))
    assert "\n" not in str(error.value)
    data = image_folder(folder, 8, on_damaged="skip")
    x1, _ = data.batch(np.arange(3))
    assert torch.allclose(x1[:, 0, 0, 0], torch.tensor([100, 102, 102]) / 127.5 - 1)  # the next stands in for it
    assert data.damaged == {str(folder / "1.png")}


def test_a_label_goes_with_the_picture_that_stands_in(tmp_path):
    save(tmp_path / "a/0.png", flat(1))
    save(tmp_path / "b/0.png", flat(2))
    (tmp_path / "a/0.png").write_bytes(b"")
    x1, condition = image_folder(tmp_path, 8, on_damaged="skip").batch(np.array([0]))
    assert condition["label"].tolist() == [1] and torch.allclose(x1, torch.tensor(2 / 127.5 - 1))
    (tmp_path / "b/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 pictures"):
        image_folder(tmp_path, 8, on_damaged="skip").batch(np.array([0]))


def test_sixteen_bits_are_not_cut_off_in_silence(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png .*mode I;16 is not 8 bits"):
        image_folder(tmp_path, 8).batch(np.array([0]))


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        image_folder(tmp_path / "missing", 8)
    with pytest.raises(ValueError, match="holds no pictures"):
        image_folder(tmp_path, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*empty holds no pictures"):
        image_folder(tmp_path, 8)
    save(tmp_path / "x.png", flat(0))
    with pytest.raises(ValueError, match=r"x\.png lies beside the class folders"):
        image_folder(tmp_path, 8)
    for options, message in (
        ({"size": 0}, "size = 0"),
        ({"size": (4, 4, 4)}, "size = "),
        ({"size": 8, "channels": 4}, "channels = 4"),
        ({"size": 8, "on_damaged": "ignore"}, "on_damaged = 'ignore'"),
    ):
        with pytest.raises(ValueError, match=message):
            image_folder(tmp_path, **options)
