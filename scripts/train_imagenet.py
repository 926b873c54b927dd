#!/usr/bin/env python3
"""`blsam train-imagenet`: train a plain ViT, or a bLViT against a plain one, on labelled images."""

import sys

from blsam.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-imagenet", *sys.argv[1:]]))
