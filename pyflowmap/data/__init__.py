"""Small real data sets that ship inside packages: nothing is fetched."""

from .digits import load_digits

__all__ = ["load_digits"]
