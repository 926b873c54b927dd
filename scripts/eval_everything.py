#!/usr/bin/env python3
"""`blsam evaluate everything`: annotated objects among the masks of everything-mode."""

import sys

from blsam.__main__ import start

if __name__ == "__main__":
    sys.exit(start(["evaluate", "everything", *sys.argv[1:]]))
