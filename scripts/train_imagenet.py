#!/usr/bin/env python3
"""`blsam train-imagenet`: train a plain ViT, or a bLViT against a plain one, on labelled images."""

import sys

from blsam.__main__ import start

if __name__ == "__main__":
    sys.exit(start(["train-imagenet", *sys.argv[1:]]))
