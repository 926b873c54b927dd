"""Where the choice of tokens matters: by what they are chosen, over how narrow the narrow blocks are.

    python -m scripts.studies.study_choice segmenter --checkpoint vit_t.safetensors --images PHOTOS \
        --annotations instances_val2017.json --annotation-images val2017 --output segmenter.jsonl
    python -m scripts.studies.study_choice classifier --checkpoint vit_mini.safetensors --images cifar10_train.tar.xz \
        --val-data cifar10_test.tar.xz --output classifier.jsonl

Narrow blocks of every width are calibrated, without training; width 0 has none. On each, tokens are chosen in turn by
every rule of `CHOICES` at every keep ratio, one JSON line each; lines that the output holds are not measured again.
Differences to random choice are paired, with 95 % intervals by bootstrap over photos (segmenter: box mean IoU, the
most confident of three masks) or over images (classifier: top-1).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos, window_partition, window_unpartition
from torch.utils.data import DataLoader
from tqdm import tqdm

from blsam import SamPredictor
from blsam.build_classifier import build_classifier
from blsam.build_sam import build_sam
from blsam.checkpoint import save
from blsam.config import CLASSIFIERS, CONFIGS
from blsam.data.annotations import Annotations
from blsam.data.imagenet import EvaluationImages, EvaluationTransform, checked, collate, open_images
from blsam.encoded import Encoded
from blsam.evaluation.prompted import Box, PromptedIoU, bootstrap, predict_objects
from blsam.evaluation.protocols import PROTOCOLS
from blsam.files import sha256, write_text
from blsam.images import read_annotated
from blsam.modeling.attention import Attention
from blsam.modeling.routing import Routing, Stage
from blsam.modeling.staged import Staged
from blsam.modeling.windows import PATCH
from blsam.options import Parser, check_output, exit_status, parse_ratios
from blsam.training.calibrate import calibrate, choose_photos, default_limit
from blsam.training.calibration import Calibration, Settings

KEEP_RATIOS = (0.05, 0.1, 0.25)
WIDTHS = {"segmenter": (48, 24, 12, 0), "classifier": (24, 12, 6, 0)}
MODELS: dict[str, Any] = {
    "segmenter": CONFIGS["blsam_vit_t"],
    "classifier": CLASSIFIERS["blvit_mini_patch4_32"],
}
BATCH = 50  # images of the classifier


# --- rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What a rule may look at, for one predictor's stage: the model; the stage's number; tokens [B, *T, C] before and
    after the layer that precedes it; the predictor's scores [B, *T]; box: of the prompt, x1 y1 x2 y2 in tokens; seed of
    the photo."""

    model: Staged
    number: int
    before: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    box: Box | None
    seed: int


Rule = Callable[[Scene], torch.Tensor]  # what tokens are ranked by, places [B, *T], the highest are prime


def by_chance(scene: Scene) -> torch.Tensor:
    """A new draw in every stage."""
    generator = torch.Generator().manual_seed(1000 * scene.seed + scene.number)
    return torch.rand(scene.scores.shape, generator=generator)


def by_norm(scene: Scene) -> torch.Tensor:
    """The length of the token."""
    return scene.tokens.norm(dim=-1)


def by_predictor(scene: Scene) -> torch.Tensor:
    """The calibrated importance predictor: where the narrow blocks are worst."""
    return scene.scores


def by_residual(scene: Scene) -> torch.Tensor:
    """What the predictor guesses, computed: the squared distance between what wide and narrow blocks add, through the
    layers of the stage with all tokens wide. Costs more than it could save; the best that a predictor can be."""
    x, left = scene.tokens, torch.zeros_like(scene.scores)
    for i in scene.model.config.layers_of(scene.number):
        block: Any = scene.model.blocks[i]
        for half in ("attention", "feed_forward"):
            added = getattr(block, half)(x)
            narrow = 0 if block.e_block is None else getattr(block.e_block, half)(x)
            left = left + (added - narrow).square().sum(-1)
            x = x + added
    return left


def by_attention(scene: Scene) -> torch.Tensor:
    """Attention received in the layer before, a mean over heads and queries (A-MoD, arXiv 2412.20875), computed with all
    tokens wide: of a routed layer the model itself has a part of that map alone."""
    block: Any = scene.model.blocks[scene.model.config.predictor_layers[scene.number]]
    x = block.norm1(scene.before)
    return received_in_windows(block.attn, x) if isinstance(block.attn, Attention) else received(block.attn, x)


def by_turns(scene: Scene) -> torch.Tensor:
    """At random, and every stage takes those that have not been prime yet."""
    generator, stages = torch.Generator().manual_seed(scene.seed), len(scene.model.predictors)
    order = torch.rand(scene.scores.shape, generator=generator)
    return (order + scene.number / stages) % 1


def by_box(scene: Scene) -> torch.Tensor:
    """Nearness to the prompt's box in whole tokens; those equally near, as all in it are, by turns."""
    assert scene.box is not None
    (x1, y1, x2, y2), (height, width) = scene.box, scene.scores.shape[-2:]
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    zero = torch.zeros(())
    across = torch.maximum(torch.maximum(x1 - x, x - x2), zero)
    down = torch.maximum(torch.maximum(y1 - y, y - y2), zero)
    return by_turns(scene) - (across.square() + down.square()).sqrt().ceil()


def by_box_and_turns(scene: Scene) -> torch.Tensor:
    """Every other place near the box, the rest by turns."""
    near, turns = (rule(scene).flatten(1).argsort(dim=1).argsort(dim=1) for rule in (by_box, by_turns))
    return torch.maximum(near, turns).view(scene.scores.shape).float()  # the place in the better of both orders


CHOICES: dict[str, Rule] = {
    "random": by_chance,
    "norm": by_norm,
    "predictor": by_predictor,
    "residual": by_residual,
    "attention": by_attention,
    "turns": by_turns,
    "box": by_box,
    "box and turns": by_box_and_turns,
    "box, any window": by_box,  # as many tokens in all, wherever they are
}
FOR_PROMPTS = {name for name in CHOICES if name.startswith("box")}  # the image is encoded for every prompt


def received(attn: Any, x: torch.Tensor, add_positions: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    """Attention that each token of a group gets from all of it, a mean over heads and queries: [G, n, C] -> [G, n]."""
    q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # -> [3, G, heads, n, d]
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if add_positions is not None:
        logits = add_positions(logits.flatten(0, 1), q.flatten(0, 1)).view(logits.shape)
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def received_in_windows(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    """The same in SAM's windows, with its relative positions: [B, H, W, C] -> [B, H, W]."""
    side = attn.window
    windows, padded = window_partition(x, side)  # [B*nW, w, w, C]

    def add_positions(logits: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return add_decomposed_rel_pos(logits, q, attn.rel_pos_h, attn.rel_pos_w, (side, side), (side, side))

    found = received(attn, windows.flatten(1, 2), add_positions).view(-1, side, side, 1)
    return window_unpartition(found, side, padded, x.shape[1:3])[..., 0]


@torch.no_grad()
def run(
    model: Staged,
    images: torch.Tensor,
    sizes: list[tuple[int, int]],
    keep_ratio: float,
    choice: str,
    box: Box | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, Routing]:
    """What comes out of the last block, [B, *T, C], with every stage's tokens chosen by a rule of `CHOICES`."""
    before = x = model.stem(images)
    stages = []
    for number in (None, *range(len(model.predictors))):
        stage = None
        if number is not None:
            scores = model.scores(number, x)
            rank_by = CHOICES[choice](Scene(model, number, before, x, scores, box, seed))
            if choice == "box, any window":
                stage = model.accept(anywhere(model, rank_by, keep_ratio, sizes), scores, choice)
            else:
                stage = model.choose(scores, rank_by, keep_ratio, sizes)
            stages.append(stage)
        for i in model.config.layers_of(number):
            before, x = x, model.run_layer(i, x, stage)
    return x, Routing(tuple(stages))


def anywhere(model: Any, rank_by: torch.Tensor, keep_ratio: float, sizes: list[tuple[int, int]]) -> Stage:
    """The highest of the whole image, as many as the windows would have together."""
    real = model.asked(torch.tensor(sizes))
    count = int(model.choose(rank_by, rank_by, keep_ratio, sizes).mask.sum())
    best = rank_by.masked_fill(~real, -torch.inf).flatten().topk(count).indices
    mask = torch.zeros(rank_by.numel(), dtype=torch.bool).index_fill(0, best, True).view(rank_by.shape)
    return Stage.from_mask(mask, model.config.window)


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Values in percent, [n], and the photo or image of each, [n]."""

    values: np.ndarray
    images: np.ndarray


class Segmenter:
    """Box mean IoU on annotated photos; rules that follow the prompt encode a photo once for every box."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.config = args, MODELS["segmenter"]
        self.annotations = Annotations(args.annotations, args.annotation_images, "coco")
        self.photos = choose_photos(args.images, args.limit or default_limit(self.config), args.seed)

    def calibrated(self, width: int, path: Path) -> Any:
        config = narrowed(self.config, width)
        if not path.is_file():
            calibrate(config, self.args.checkpoint, self.photos, path, settings=Settings())
        return build_sam(config, path)

    def dense(self) -> Measured:
        return self.measure(build_sam(self.config.dense, self.args.checkpoint), 1.0, "random")

    def measure(self, sam: Any, keep_ratio: float, choice: str) -> Measured:
        evaluator = PromptedIoU(self.annotations, PROTOCOLS["paper"], "box")
        predictor = SamPredictor(sam)
        photos = self.annotations.photos[: self.args.test_photos]
        for seed, photo in enumerate(tqdm(photos, leave=False, disable=not sys.stderr.isatty())):
            targets, _ = self.annotations.targets(photo, crowd=False)
            groups = [[target] for target in targets] if choice in FOR_PROMPTS else [targets] if targets else []
            image, rows = read_annotated(photo.path, (photo.height, photo.width)), []
            for group in groups:
                self.encode(predictor, image, keep_ratio, choice, group[0].box, seed)
                rows += predict_objects(predictor, group, PROTOCOLS["paper"], "box", 1, seed=0)
            evaluator.process(photo, rows)
        found = [(100 * row["iou"], row["image"]) for row in evaluator.rows]
        return Measured(*(np.array(column) for column in zip(*found)))

    @torch.no_grad()
    def encode(
        self, predictor: SamPredictor, image: np.ndarray, keep_ratio: float, choice: str, box: Box, seed: int
    ) -> None:
        """Let a predictor hold a photo, its tokens chosen by a rule."""
        sam, resized = predictor.model, predictor.transform.apply_image(image)
        (height, width), across = resized.shape[:2], resized.shape[1] / image.shape[1] / PATCH  # pixels -> tokens
        x = sam.preprocess(torch.as_tensor(resized).permute(2, 0, 1))[None]  # [h, w, 3] -> [1, 3, S, S]
        x1, y1, x2, y2 = (across * side for side in box)
        tokens, routing = run(sam.image_encoder, x, [(height, width)], keep_ratio, choice, (x1, y1, x2, y2), seed)
        features = sam.image_encoder.compared(tokens)
        predictor.set_encoded(Encoded(features, routing, (height, width), (image.shape[0], image.shape[1])))


class Classifier:
    """Top-1 on labelled images, which have no prompt."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.config = args, MODELS["classifier"]
        self.transform = EvaluationTransform(CLASSIFIERS[self.config.name].image_size)
        self.data = EvaluationImages(open_images((args.val_data,), "val"), self.transform)

    def calibrated(self, width: int, path: Path) -> Any:
        config = narrowed(self.config, width)
        model = build_classifier(config, path if path.is_file() else self.args.checkpoint)
        if not path.is_file():
            images, count = open_images((self.args.images,), "train"), self.args.limit or default_limit(config)
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.args.seed))[:count]
            inputs = [self.transform(images.read(i)) for i in chosen.tolist()]
            folder = path.with_suffix(".calibration")
            Calibration(model, lambda i: (inputs[i], model.img_size), count, Settings(), folder).run()
            shutil.rmtree(folder)
            save(path, model.state_dict(), {"model": config.name})
        return model

    def dense(self) -> Measured:
        return self.measure(build_classifier(self.config.dense, self.args.checkpoint), 1.0, "random")

    @torch.no_grad()
    def measure(self, model: Any, keep_ratio: float, choice: str) -> Measured:
        right = []
        for images, labels in map(checked, DataLoader(self.data, BATCH, collate_fn=collate)):
            tokens, _ = run(model, images, [], keep_ratio, choice, seed=len(right))
            right.append(100.0 * (model.forward_head(model.norm(tokens)).argmax(1) == labels))
        values = torch.cat(right).numpy()
        return Measured(values, np.arange(len(values)))


def narrowed(config: Any, width: int) -> Any:
    """The model with narrow blocks of another width; 0: without."""
    return replace(config, e_dim=width) if width else replace(config, e_block=False)


def rows(task: Segmenter | Classifier, args: argparse.Namespace, done: set[str]) -> Iterator[list[dict[str, Any]]]:
    """The lines of one width and keep ratio after the other."""
    dense = None
    choices = [name for name in CHOICES if args.task == "segmenter" or name not in FOR_PROMPTS]
    for width in args.widths:
        for keep_ratio in args.keep_ratios:
            name = key(args, width, keep_ratio)
            if name in done:
                continue
            dense = dense or task.dense()
            of_model = f"{args.weights[:8]}-{width}-{args.limit}-{args.seed}"
            model = task.calibrated(width, args.output.with_suffix(f".{of_model}.safetensors"))
            found = {choice: task.measure(model, keep_ratio, choice) for choice in choices}
            yield [
                {"of": name, "width": width, "keep_ratio": keep_ratio, "choice": choice, "dense": dense.values.mean()}
                | {"value": one.values.mean(), "over_random": mean_over(one, found["random"])}
                | {"over_dense": mean_over(one, dense), "count": len(one.values)}
                for choice, one in found.items()
            ]


def mean_over(one: Measured, other: Measured) -> list[float]:
    """The mean difference, and the bounds of its interval."""
    difference = one.values - other.values
    return [difference.mean(), *bootstrap(difference, one.images, 0)]


def key(args: argparse.Namespace, width: int, keep_ratio: float) -> str:
    """What lines are told apart by."""
    parts = (args.task, args.weights[:8], width, keep_ratio, args.limit, args.seed, args.test_photos)
    return ", ".join(map(str, parts))


# --- the command -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("task", choices=tuple(MODELS))
    add("--checkpoint", type=Path, required=True, help="of the dense model")
    add("--images", type=Path, required=True, help="to calibrate on: a folder, for the classifier labelled images")
    add("--annotations", type=Path, metavar="JSON", help="segmenter: COCO's format")
    add("--annotation-images", type=Path, metavar="DIR")
    add("--test-photos", type=int, metavar="N", help="segmenter: the first N alone")
    add("--val-data", type=Path, help="classifier: labelled images to measure on")
    add("--widths", type=int, nargs="+", help="of the narrow blocks, 0: none")
    add("--keep-ratios", type=parse_ratios, default=KEEP_RATIOS)
    add("--limit", type=int, help="photos to calibrate on; default: as `blsam calibrate`")
    add("--seed", type=int, default=0)
    add("--output", type=Path, required=True, metavar="JSONL", help="calibrated models are kept beside it")
    args = parser.parse_args(argv)
    needed = {"segmenter": ("annotations", "annotation_images"), "classifier": ("val_data",)}[args.task]
    for name in needed:
        if getattr(args, name) is None:
            parser.error(f"the {args.task} needs --{name.replace('_', '-')}")
    args.widths = args.widths or WIDTHS[args.task]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_output("--output", args.output, taken=(args.checkpoint, args.annotations))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.weights = sha256(args.checkpoint)
    lines = args.output.read_text().splitlines() if args.output.is_file() else []
    task = Segmenter(args) if args.task == "segmenter" else Classifier(args)
    for found in rows(task, args, {json.loads(line)["of"] for line in lines}):
        new = [json.dumps(rounded(row)) for row in found]
        lines += new
        write_text(args.output, "\n".join(lines) + "\n")
        print("\n".join(new), flush=True)
    return 0


def rounded(value: Any) -> Any:
    """Floats to four digits, in rows and lists too."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return (
        [rounded(one) for one in value]
        if isinstance(value, list)
        else (round(float(value), 4) if isinstance(value, float | np.floating) else value)
    )


if __name__ == "__main__":
    sys.exit(exit_status("study_choice", main))
