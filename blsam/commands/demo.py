"""A page to click on, on this machine, until Ctrl-C.

blsam demo
blsam demo --model vit_b --checkpoint sam_vit_b_01ec64.pth --port 8000
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..options import UsageError, add_model_options, builder_options, find_checkpoint

if TYPE_CHECKING:
    from ..modeling.sam import Sam


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets the whole network in; default: this machine")
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Until Ctrl-C."""
    checkpoint = find_checkpoint(args.model, args.checkpoint)
    keep_ratio = round(args.keep_ratio, 2)  # as the page asks for it
    if keep_ratio < 0.01:
        raise UsageError("the keep ratio of the page lies between 0.01 and 1")
    try:
        from ..demo import page
        from ..demo.segmenter import Segmenter
    except ModuleNotFoundError as error:
        raise UsageError(f"the page needs {error.name}: pip install 'blsam[demo]'") from None
    from ..build_sam import sam_model_registry

    def build() -> Sam:
        sam = sam_model_registry[args.model](checkpoint, **builder_options(args))
        if (engine := sam.image_encoder.engine) is not None:
            engine.only = frozenset((keep_ratio, 1.0))  # the slider's other places would each be compiled
        return sam

    listener = page.bind(args.host, args.port)
    segmenter = Segmenter(build)
    segmenter.warm_up(keep_ratio)
    page.serve(page.build_app(segmenter, args.model, keep_ratio), listener)
