"""`blsam`, `python -m blsam`, and `torchrun -m blsam train`."""

import sys

from .cli import main
from .memory import keep_memory


def start(argv: list[str] | None = None) -> int:
    """The command as a process of its own."""
    keep_memory()
    return main(argv)


if __name__ == "__main__":
    sys.exit(start())
