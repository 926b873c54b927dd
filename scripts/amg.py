#!/usr/bin/env python3
"""SAM's amg.py with its own options and outputs, on these models; `blsam masks` does more.

python scripts/amg.py --checkpoint sam_vit_b_01ec64.pth --model-type vit_b --input photos --output masks
"""

import sys
from pathlib import Path

from blsam.commands.masks import add_settings, make_masks
from blsam.memory import keep_memory
from blsam.options import OPTIONS, Parser, add_option, exit_status

SAM_DEFAULT = "vit_h"  # what SAM's "default" is


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, help="photo or folder; a tar too")
    add("--output", type=Path, required=True, help="a folder of PNGs for each photo, or with --convert-to-rle a json")
    add("--model-type", choices=("default", *OPTIONS["--model"]["choices"]), required=True)
    add_option(parser, "--checkpoint", required=True, help=None)
    add("--convert-to-rle", action="store_true", help="masks as COCO's run-lengths")
    for name in ("--device", "--keep-ratio", "--image-size", "--dtype", "--runtime", "--no-cache"):
        add_option(parser, name)
    add_settings(parser)
    args = parser.parse_args()
    args.model = SAM_DEFAULT if args.model_type == "default" else args.model_type
    args.photos, args.no_exif = [args.input], False  # upright, as OpenCV reads
    args.format = "rle" if args.convert_to_rle else "png"
    make_masks(args, {})  # SAM's defaults, whatever the model


if __name__ == "__main__":
    keep_memory()
    sys.exit(exit_status("amg", main))
