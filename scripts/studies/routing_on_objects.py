"""Whether the wide blocks run on objects: the share of prime tokens on annotated objects beside the objects' area.

    python -m scripts.studies.routing_on_objects --annotations instances_val2017.json --annotation-images val2017

A token counts by the part of its pixels that lies on an object, crowds included; only tokens of the photo count, not
padding. In every window the same share of the tokens is prime, so no choice can put all of them on objects: `best` is
what one could reach that takes the most covered tokens of each window, `gain` how much of the way from the area to
there the model goes (below 0: it prefers background), with a 95 % interval by bootstrap over photos.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from blsam import SamPredictor, sam_model_registry
from blsam.data.annotations import Annotations, Photo
from blsam.files import write_text
from blsam.images import read_annotated
from blsam.modeling.routing import route
from blsam.modeling.windows import PATCH, real_tokens
from blsam.options import ROUTED, Parser, add_option, check_output, exit_status, find_checkpoint


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_option(parser, "--model", choices=ROUTED, default="blsam_vit_t")
    add_option(parser, "--checkpoint")
    add("--annotations", type=Path, metavar="JSON", required=True, help="COCO's format")
    add("--annotation-images", type=Path, metavar="DIR", required=True)
    add_option(parser, "--keep-ratio")
    add("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    annotations = Annotations(args.annotations, args.annotation_images, "coco")
    checkpoint = find_checkpoint(args.model, args.checkpoint)
    check_output("--json", args.json, taken=(args.annotations, checkpoint))
    sam = sam_model_registry[args.model](checkpoint, keep_ratio=args.keep_ratio)
    predictor = SamPredictor(sam)
    sums = [
        stage_sums(predictor, annotations, photo)
        for photo in tqdm(annotations.photos, unit="photo", disable=not sys.stderr.isatty())
    ]
    result = figures(np.stack([one for one in sums if one is not None]))
    for i, stage in enumerate(result):
        low, high = stage["gain_interval_95"]
        layer = sam.image_encoder.config.predictor_layers[i]
        print(f"after layer {layer}: objects cover {stage['area']:.1f} % of the tokens, {stage['prime']:.1f} % of the "
              f"prime ones (best {stage['best']:.1f}), gain {stage['gain']:.1f} % ({low:.1f} to {high:.1f})")  # fmt: skip
    if args.json is not None:
        text = json.dumps(result, indent=1) + "\n"
        write_text(args.json, text)
    return 0


def stage_sums(predictor: SamPredictor, annotations: Annotations, photo: Photo) -> np.ndarray | None:
    """[stages, 3, 2]: of real, prime and best tokens the covered parts, summed, and their number; None: no object."""
    targets, _ = annotations.targets(photo, crowd=True)
    if not targets:
        return None
    encoder = predictor.model.image_encoder
    predictor.set_image(read_annotated(photo.path, (photo.height, photo.width)))
    covered = coverage(np.any([target.mask for target in targets], axis=0), predictor.input_size, encoder.img_size)
    side, sizes = covered.shape[-1], [predictor.input_size]
    real = real_tokens(side, side, torch.tensor(sizes))
    best = route(covered, covered, encoder.config.window, encoder.keep_ratio, sizes).mask & real
    found = []
    for stage in predictor.routing.stages:
        of = (real, stage.mask & real, best)
        found.append([[float(covered[mask].sum()), float(mask.sum())] for mask in of])
    return np.array(found)


def coverage(mask: np.ndarray, input_size: tuple[int, int], side: int) -> torch.Tensor:
    """The part of each token that a mask covers: bool [H, W] -> float32 [1, S/16, S/16] in [0, 1]; padding 0."""
    h, w = input_size
    frame = np.zeros((side, side), np.float32)
    frame[:h, :w] = cv2.resize(mask.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA)
    grid = frame.reshape(side // PATCH, PATCH, side // PATCH, PATCH)  # [S, S] -> [S/16, 16, S/16, 16]
    return torch.from_numpy(grid.mean((1, 3)))[None]


def figures(sums: np.ndarray, resamples: int = 1000) -> list[dict[str, float | list[float]]]:
    """Of [photos, stages, 3, 2] as `stage_sums` gives them, percents over all photos for each stage."""
    draws = np.random.default_rng(0).integers(len(sums), size=(resamples, len(sums)))
    result = []
    for stage in range(sums.shape[1]):

        def shares(chosen: np.ndarray, stage: int = stage) -> np.ndarray:
            covered, count = sums[chosen, stage].sum(-3).T  # [3] each; of resamples [3, R]
            return 100 * covered / count

        area, prime, best = shares(np.arange(len(sums)))
        resampled = shares(draws)
        gains = 100 * (resampled[1] - resampled[0]) / (resampled[2] - resampled[0])
        row = {"area": area, "prime": prime, "best": best, "gain": 100 * (prime - area) / (best - area)}
        rounded: dict[str, float | list[float]] = {name: round(float(value), 2) for name, value in row.items()}
        result.append(rounded | {"gain_interval_95": np.percentile(gains, (2.5, 97.5)).round(2).tolist()})
    return result


if __name__ == "__main__":
    sys.exit(exit_status("routing_on_objects", main))
