#!/usr/bin/env python3
"""`blsam evaluate zero-shot`: average precision of masks for boxes, on COCO or LVIS."""

import sys

from blsam.__main__ import start

if __name__ == "__main__":
    sys.exit(start(["evaluate", "zero-shot", *sys.argv[1:]]))
