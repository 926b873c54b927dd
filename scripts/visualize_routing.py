#!/usr/bin/env python3
"""Where the encoder spent its wide blocks: prime tokens, scores, and how often each token was prime.

python scripts/visualize_routing.py photo.jpg                          # runs/routing/photo.png
python scripts/visualize_routing.py *.jpg --keep-ratio 0.1 -o pictures
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from blsam import SamPredictor, sam_model_registry
from blsam.files import write_atomically
from blsam.images import read_image
from blsam.options import (
    ROUTED,
    Parser,
    UsageError,
    add_option,
    builder_options,
    check_output,
    exit_status,
    find_checkpoint,
)
from blsam.visualize import routing_figure


def draw(predictor: SamPredictor, image: np.ndarray, path: Path) -> None:
    """Encode a photo, uint8 [H, W, 3] RGB, and write the picture of its routing."""
    predictor.set_image(image)
    layers = predictor.model.image_encoder.config.predictor_layers
    figure = routing_figure(image, predictor.routing, predictor.input_size, layers)
    write_atomically(path, partial(figure.savefig, dpi=110))


def main() -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("photos", type=Path, nargs="+", metavar="PHOTO")
    add_option(parser, "--model", choices=ROUTED)
    add_option(parser, "--checkpoint")
    add_option(parser, "--keep-ratio")
    add_option(parser, "--image-size")
    add_option(parser, "--device")
    add_option(parser, "--dtype", default="float32")
    add("-o", "--output", type=Path, metavar="DIR", default=Path("runs/routing"))
    args = parser.parse_args()
    names = [photo.stem for photo in args.photos]
    if len(set(names)) < len(names):
        raise UsageError("two photos have the same name: their pictures would overwrite each other")
    checkpoint = find_checkpoint(args.model, args.checkpoint)
    paths = [args.output / f"{name}.png" for name in names]
    for path in paths:
        check_output("--output", path, taken=(*args.photos, checkpoint))
    images = [read_image(photo) for photo in args.photos]

    sam = sam_model_registry[args.model](checkpoint, **builder_options(args))
    predictor = SamPredictor(sam)
    for path, image in zip(paths, tqdm(images, unit="photo", disable=not sys.stderr.isatty())):
        draw(predictor, image, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("visualize_routing", main))
