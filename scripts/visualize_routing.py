#!/usr/bin/env python3
"""Where the encoder spent its wide blocks: prime tokens, scores, and how often each token was prime.

python scripts/visualize_routing.py photo.jpg                          # runs/routing/photo.png
python scripts/visualize_routing.py *.jpg --keep-ratio 0.1 -o pictures
python scripts/visualize_routing.py dog.jpg --model blvit_base_tiny_patch16_224 --checkpoint trained.safetensors
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from blsam import SamPredictor, sam_model_registry
from blsam.build_classifier import build_classifier
from blsam.config import CLASSIFIERS
from blsam.data.imagenet import MEAN, STD, classifier_input
from blsam.files import write_atomically
from blsam.images import read_image
from blsam.modeling.classifier import BLVisionTransformer
from blsam.modeling.sam import Sam
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
from blsam.visualize import class_routing_figure, routing_figure


def segmenter(sam: Sam) -> Callable[[np.ndarray], Figure]:
    """From a photo, uint8 [H, W, 3] RGB, to the picture of its routing."""
    predictor = SamPredictor(sam)

    def draw(image: np.ndarray) -> Figure:
        predictor.set_image(image)
        layers = sam.image_encoder.config.predictor_layers
        return routing_figure(image, predictor.routing, predictor.input_size, layers)

    return draw


def classifier(model: BLVisionTransformer) -> Callable[[np.ndarray], Figure]:
    """As `segmenter`; the classifier sees the centre of the photo alone."""
    size, device = model.img_size[0], model.cls_token.device

    @torch.no_grad()
    def draw(image: np.ndarray) -> Figure:
        seen = classifier_input(image, size)
        _, routing = model.encode(seen[None].to(device))
        pixels = (seen * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1)
        shown = (255 * pixels).round().byte().permute(1, 2, 0).numpy()  # [3, S, S] -> [S, S, 3]
        return class_routing_figure(shown, routing, model.grid, model.config.predictor_layers)

    return draw


def write_figure(figure: Figure, path: Path) -> None:
    write_atomically(path, partial(figure.savefig, dpi=110))


def main() -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("photos", type=Path, nargs="+", metavar="PHOTO")
    add_option(parser, "--model", choices=(*ROUTED, *(name for name, config in CLASSIFIERS.items() if config.routed)))
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

    options = builder_options(args)
    if args.model in CLASSIFIERS:
        draw = classifier(build_classifier(CLASSIFIERS[args.model], checkpoint, **options))
    else:
        draw = segmenter(sam_model_registry[args.model](checkpoint, **options))
    for path, image in zip(paths, tqdm(images, unit="photo", disable=not sys.stderr.isatty())):
        write_figure(draw(image), path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("visualize_routing", main))
