#!/usr/bin/env python3
"""`blsam evaluate lvis`: mean IoU of prompted masks on LVIS annotations."""

import sys

from blsam.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", "lvis", *sys.argv[1:]]))
