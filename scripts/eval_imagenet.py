#!/usr/bin/env python3
"""`blsam evaluate-imagenet`: top-1, top-5, multiply-adds and images a second of a classifier."""

import sys

from blsam.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate-imagenet", *sys.argv[1:]]))
