#!/usr/bin/env python3
"""`blsam evaluate coco`: mean IoU of prompted masks on COCO annotations."""

import sys

from blsam.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", "coco", *sys.argv[1:]]))
