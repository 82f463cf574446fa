"""Data sets and the stream of batches that training reads. Nothing is fetched unless asked, nothing is unpickled.

A set has `batch(indices) -> (x1, condition)`, a `shape` and, unless endless, a length: `DataSet`.
"""

from .checkerboard import checkerboard
from .data_set import DataSet, example
from .digits import digits, load_digits
from .huggingface import huggingface
from .image_folder import image_folder
from .latents import latents
from .mixture import mixture
from .stream import Batch, Stream
from .write_latents import write_latents

__all__ = [
    "Batch",
    "DataSet",
    "Stream",
    "checkerboard",
    "digits",
    "example",
    "huggingface",
    "image_folder",
    "latents",
    "load_digits",
    "mixture",
    "write_latents",
]
