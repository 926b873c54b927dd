"""The evaluation scripts' common part: options, run, table, json."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data.annotations import Annotations, Photo
from ..images import read_image
from .instance_ap import InstanceAP, predict_boxes, read_detections, true_boxes
from .models import Subject, add_model_arguments, load_subject
from .prompted import PromptedIoU, predict_objects
from .protocols import PROTOCOLS, SAMPLINGS, SELECTIONS, Protocol
from .report import left_out_line, provenance, speed, table, write_json
from .runner import Stopwatch, predict_photos, processes

OVERRIDES = {  # option -> field of the protocol
    "point_sampling": "sampling",
    "select": "select",
    "crowd": "crowd",
    "single_mask": "single_mask",
}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured on, and where results go."""
    add = parser.add_argument_group("data and results").add_argument
    add("--annotations", type=Path, required=True, metavar="JSON")
    add("--images", type=Path, required=True, metavar="DIR", help="DIR/<split of coco_url>/<name> or DIR/<name>")
    add("--limit", type=int, metavar="N", help="the first N images by id")
    add("--skip-missing", action="store_true", help="leave out images that are not there, and say how many")
    add("--seed", type=int, default=0)
    add("--output", type=Path, metavar="DIR", help="run folder with the predictions; default runs/eval/<name>-<hash>")
    add("--resume", action="store_true", help="go on from what the run folder holds")
    add("--json", type=Path, metavar="OUT", help="figures, rules, versions, hashes")


# --- prompted masks --------------------------------------------------------------------------------------------------


def prompted_arguments(description: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add = parser.add_argument_group("protocol").add_argument
    add("--prompt", choices=("box", "point"), default="box")
    add("--num-points", type=int, default=1, metavar="N")
    add("--protocol", choices=tuple(PROTOCOLS), default="paper", help="sets the defaults of what follows")
    add("--point-sampling", choices=SAMPLINGS)
    add("--select", choices=SELECTIONS, help="of three masks the most confident, or the best by true IoU")
    add("--single-mask", action="store_const", const="always", help="ask for one mask instead of three")
    add("--crowd", action=argparse.BooleanOptionalAction, help="count crowd annotations")
    args = parser.parse_args(argv)
    if args.num_points < 1 or (args.prompt == "box" and args.num_points > 1):
        parser.error("--num-points is at least 1, and goes with --prompt point")
    if args.prompt == "box" and args.point_sampling is not None:
        parser.error("--point-sampling goes with --prompt point")
    if args.seed < 0:
        parser.error("--seed is at least 0")
    return args


def protocol_of(args: argparse.Namespace) -> tuple[Protocol, str]:
    """The rules asked for, and their name: "paper", or "paper, modified: --select oracle"."""
    protocol, changes = PROTOCOLS[args.protocol], []
    for option, field in OVERRIDES.items():
        value = getattr(args, option)
        if value is not None and value != getattr(protocol, field):
            protocol = replace(protocol, **{field: value})
            flag = "--" + option.replace("_", "-")
            switch = {True: flag, False: f"--no-{option}", "always": flag}
            changes.append(switch[value] if value in switch else f"{flag} {value}")
    return protocol, protocol.name + (f", modified: {' '.join(changes)}" if changes else "")


def run_prompted(kind: str, description: str, argv: list[str] | None = None) -> int:
    """`scripts/eval_coco.py` and `scripts/eval_lvis.py`; kind "coco" or "lvis"."""
    args = prompted_arguments(description, argv)
    protocol, name = protocol_of(args)
    with processes() as (rank, world):
        annotations = Annotations(args.annotations, args.images, kind, args.limit, args.skip_missing)
        subject = load_subject(args)
        settings = {**subject.identity, **_data_settings(args, annotations), "prompt": args.prompt}
        settings |= {"num_points": args.num_points, "protocol": name, "rules": asdict(protocol)}

        def predict(photo: Photo, watch: Stopwatch) -> list[dict[str, Any]]:
            targets, _ = annotations.targets(photo, crowd=protocol.crowd, min_area=protocol.min_area)
            if not targets:
                return []
            _set_image(subject, photo, watch)
            with watch("decoder"):
                return predict_objects(subject.predictor, targets, protocol, args.prompt, args.num_points, args.seed)

        folder = _folder(args, f"{kind}-{args.prompt}", settings)
        lines = predict_photos(
            annotations.photos, predict, folder, settings, subject.device, resume=args.resume, rank=rank, world=world
        )
    if lines is None:
        return 0
    evaluator = PromptedIoU(annotations, protocol, args.prompt, args.seed)
    for photo, line in zip(annotations.photos, lines):
        evaluator.process(photo, line["rows"])
    figures = evaluator.evaluate()
    ious = [{k: row[k] for k in ("image", "annotation", "iou")} for row in evaluator.rows]
    write_json(folder / "ious.json", ious, indent=None)
    images = len({row["image"] for row in evaluator.rows})
    print(subject.describe())
    print(f"protocol {name}: {protocol.rules(args.prompt, args.num_points)}; seed {args.seed}")
    print(
        f"{len(lines)} images, {images} with objects, {figures['count']} objects; {left_out_line(figures['left_out'])}"
    )
    print(table(figures, args.prompt))
    _finish(args, folder, settings, figures | {"images": len(lines)}, lines, world)
    return 0


# --- instance segmentation -------------------------------------------------------------------------------------------


def zero_shot_arguments(description: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add = parser.add_argument_group("boxes").add_argument
    add("--dataset", choices=("coco", "lvis"), required=True)
    add("--boxes", required=True, metavar="gt|JSON", help="true boxes (score 1), or a detector's results")
    add("--refine", action="store_true", help="feed the most confident mask back once, as the SAM paper does")
    add("--single-mask", action="store_true", help="ask for one mask instead of three")
    add("--results", type=Path, metavar="OUT", help="COCO results json; default results.json in the run folder")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error("--seed is at least 0")
    return args


def run_zero_shot(description: str, argv: list[str] | None = None) -> int:
    """`scripts/eval_zero_shot.py`."""
    args = zero_shot_arguments(description, argv)
    with processes() as (rank, world):
        annotations = Annotations(args.annotations, args.images, args.dataset, args.limit, args.skip_missing)
        if args.boxes == "gt":
            boxes, left_out = true_boxes(annotations)
        else:
            boxes, left_out = read_detections(Path(args.boxes), annotations)
        subject = load_subject(args)
        settings = {**subject.identity, **_data_settings(args, annotations), "protocol": "zero-shot"}
        settings["dataset"] = args.dataset
        digest = "gt" if args.boxes == "gt" else _digest(Path(args.boxes).read_bytes())
        settings |= {"boxes": digest, "refine": args.refine, "single_mask": args.single_mask}

        def predict(photo: Photo, watch: Stopwatch) -> list[dict[str, Any]]:
            if not boxes[photo.id]:
                return []
            _set_image(subject, photo, watch)
            with watch("decoder"):
                return predict_boxes(
                    subject.predictor, boxes[photo.id], single_mask=args.single_mask, refine=args.refine
                )

        folder = _folder(args, f"{args.dataset}-zero-shot", settings)
        lines = predict_photos(
            annotations.photos, predict, folder, settings, subject.device, resume=args.resume, rank=rank, world=world
        )
    if lines is None:
        return 0
    evaluator = InstanceAP(annotations)
    for photo, line in zip(annotations.photos, lines):
        evaluator.process(photo, line["rows"])
    results = args.results or folder / "results.json"
    write_json(results, evaluator.results, indent=None)
    figures, summary = evaluator.evaluate()
    source = "true boxes, score 1" if args.boxes == "gt" else f"boxes and scores of {Path(args.boxes).name}"
    masks = "1 mask" if args.single_mask else "3 masks, most confident"
    left_out = {k: n for k, n in sorted((annotations.left_out + left_out).items()) if n}
    print(subject.describe())
    refined = "one refinement" if args.refine else "no refinement"
    print(f"protocol zero-shot: {source}; {masks}; {refined}; crowd ignored in matching; seed {args.seed}")
    counts = (
        f"{len(lines)} images, {len(annotations.api.anns)} annotations, {len(evaluator.results)} masks in {results}"
    )
    print(f"{counts}; {left_out_line(left_out)}")
    print(summary)
    figures |= {"images": len(lines), "masks": len(evaluator.results), "left_out": left_out}
    _finish(args, folder, settings, figures, lines, world)
    return 0


# --- shared ----------------------------------------------------------------------------------------------------------


def _set_image(subject: Subject, photo: Photo, watch: Stopwatch) -> None:
    image = read_image(photo.path, upright=False)
    if image.shape[:2] != (photo.height, photo.width):
        raise ValueError(
            f"{photo.path} has {image.shape[1]} x {image.shape[0]} pixels, its annotations {photo.width} x {photo.height}"
        )
    with watch("encoder"):
        subject.predictor.set_image(image)


def _data_settings(args: argparse.Namespace, annotations: Annotations) -> dict[str, Any]:
    return {
        "annotations": _digest(args.annotations.read_bytes()),
        "photos": _digest(json.dumps([photo.id for photo in annotations.photos]).encode()),
        "seed": args.seed,
        "git_revision": provenance()["git_revision"],
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _folder(args: argparse.Namespace, task: str, settings: dict[str, Any]) -> Path:
    if args.output is not None:
        return args.output
    name = args.model.replace(":", "-")
    settings = {key: value for key, value in settings.items() if key != "git_revision"}  # resuming compares it
    return Path("runs") / "eval" / f"{task}-{name}-{_digest(json.dumps(settings, sort_keys=True).encode())[:8]}"


def _finish(
    args: argparse.Namespace,
    folder: Path,
    settings: dict[str, Any],
    figures: dict[str, Any],
    lines: list[dict[str, Any]],
    world: int,
) -> None:
    """Speed and folder on the screen, everything in the json: figures and settings side by side."""
    rates = speed(lines)
    print(
        "images a second, of one process: "
        + ", ".join(f"{part} {rate:.2f}" for part, rate in rates.items() if rate)
        + f"; predictions in {folder}"
    )
    if args.json:
        write_json(args.json, provenance() | figures | settings | {"images_per_second": rates, "processes": world})


def run_script(name: str, run: Callable[[], int]) -> None:
    """Exit with the status of `run`, or with 2 and one line for what the user can put right."""
    try:
        sys.exit(run())
    except (OSError, ValueError, ImportError) as error:
        print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
