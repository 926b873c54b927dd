#!/usr/bin/env python3
"""`blsam evaluate zero-shot`: average precision of masks for boxes, on COCO or LVIS."""

import sys

from blsam.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", "zero-shot", *sys.argv[1:]]))
