#!/usr/bin/env python3
"""`blsam evaluate everything`: annotated objects among the masks of everything-mode."""

import sys

from blsam.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", "everything", *sys.argv[1:]]))
