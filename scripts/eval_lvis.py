#!/usr/bin/env python3
"""`blsam evaluate lvis`: mean IoU of prompted masks on LVIS annotations."""

import sys

from blsam.__main__ import start

if __name__ == "__main__":
    sys.exit(start(["evaluate", "lvis", *sys.argv[1:]]))
