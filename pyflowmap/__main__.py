"""`python -m pyflowmap`: the same as the command `pyflowmap`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
