#!/usr/bin/env python3
"""`blsam evaluate-imagenet`: top-1, top-5, multiply-adds and images a second of a classifier."""

import sys

from blsam.__main__ import start

if __name__ == "__main__":
    sys.exit(start(["evaluate-imagenet", *sys.argv[1:]]))
