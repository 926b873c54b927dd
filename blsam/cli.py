"""The command `blsam`: a table of what it can do. What a command needs is imported when it is asked for."""

from __future__ import annotations

import sys
from importlib import import_module

from .options import Parser, exit_status

COMMANDS = {  # modules of `commands`, each with add_arguments(parser) and run(args)
    "segment": "a mask from clicks or a box",
    "masks": "everything in photos, folders and tars, with the options of SAM's amg.py",
    "demo": "a page to click on, on this machine",
    "models": "names, sizes, costs, and which weights are present",
    "convert": "what a checkpoint holds; the same weights for another model, image size, type or format",
    "export": "encoder and decoder as ONNX or OpenVINO files, for labelling tools too, checked against torch",
    "calibrate": "a blsam model from a SAM checkpoint and a few photos, without training",
    "train": "a SAM or a blsam model, on SA-1B, COCO, LVIS or photos of your own",
    "train-imagenet": "a classifier of the same blocks, on ImageNet, CIFAR-10 or labelled images of your own",
    "evaluate": "masks against annotations: mean IoU and average precision on COCO and LVIS",
    "evaluate-imagenet": "a classifier: top-1 and top-5, multiply-adds, images a second",
}


def build_parser(command: str | None) -> Parser:
    """All commands by name; the options of one."""
    parser = Parser(prog="blsam", description="Segment Anything with a big.LITTLE image encoder")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        one = commands.add_parser(name, help=summary)
        if name == command:
            module = import_module(f".commands.{name.replace('-', '_')}", __package__)
            one.description = module.__doc__
            module.add_arguments(one)
            one.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> int | None:
        args = build_parser(argv[0] if argv else None).parse_args(argv)
        return args.run(args)

    return exit_status("blsam", work)
