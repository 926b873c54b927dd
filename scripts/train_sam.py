#!/usr/bin/env python3
"""`blsam train`: train a dense SAM, or a bLSAM against a dense teacher."""

import sys

from blsam.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
