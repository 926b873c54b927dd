#!/usr/bin/env python3
"""`blsam evaluate coco`: mean IoU of prompted masks on COCO annotations."""

import sys

from blsam.__main__ import start

if __name__ == "__main__":
    sys.exit(start(["evaluate", "coco", *sys.argv[1:]]))
