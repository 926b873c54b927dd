#!/usr/bin/env python3
"""`blsam train`: train a dense SAM, or a bLSAM against a dense teacher."""

import sys

from blsam.__main__ import start

if __name__ == "__main__":
    sys.exit(start(["train", *sys.argv[1:]]))
