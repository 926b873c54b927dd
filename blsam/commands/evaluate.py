r"""Masks against annotations.

    blsam evaluate coco --model blsam_vit_t_fine --annotations instances_val2017.json --images val2017
    blsam evaluate lvis --model blsam_vit_t_fine --annotations lvis_v1_val.json --images coco --prompt point --num-points 3
    blsam evaluate zero-shot --model blsam_vit_t_fine --dataset coco --boxes gt \
        --annotations instances_val2017.json --images val2017
    blsam evaluate everything --model blsam_vit_t_fine --annotations instances_val2017.json --images val2017 --limit 20
    torchrun --nproc-per-node 8 -m blsam evaluate coco ...          # the same tables, images shared out

A run that was killed goes on with --resume.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import MODELS
from ..data.annotations import Annotations, Photo
from ..distributed import Stopwatch, processes
from ..evaluation.everything import FoundObjects, predict_everything
from ..evaluation.instance_ap import InstanceAP, predict_boxes, read_detections, true_boxes
from ..evaluation.models import Subject, load_subject
from ..evaluation.prompted import PromptedIoU, predict_objects
from ..evaluation.protocols import PROTOCOLS, SAMPLINGS, SELECTIONS, Protocol
from ..evaluation.report import everything_table, left_out_line, speed, table
from ..evaluation.runner import predict_photos
from ..files import provenance, sha256, write_json
from ..images import read_annotated
from ..options import UsageError, add_option, check_folder, check_output

PROMPTED = """Mean IoU of prompted masks on {data} annotations, by size, beside trivial baselines.

    blsam evaluate {name} --model blsam_vit_t_fine --annotations {json} --images {images}
    blsam evaluate {name} --model blsam_vit_t_fine ... --prompt point --num-points 3
    blsam evaluate {name} --model segment_anything:vit_b --checkpoint sam_vit_b_01ec64.pth ...

Protocols: `paper` (points uniform in the mask, all at once; three masks, the most confident; no crowd), `efficientvit`
(RITM clicks, crowd included), `sam` (centre, then farthest error, logits fed back). {more}
"""
COCO = {"data": "COCO", "json": "instances_val2017.json", "images": "val2017", "more": ""}
LVIS = {"data": "LVIS (v1 or v0.5)", "json": "lvis_v1_val.json", "images": "coco"}
LVIS["more"] = (
    "LVIS has no crowd annotations.\nLVIS v1 val has images of train2017 and of val2017: --images holds both."
)
ZERO_SHOT = """Zero-shot instance segmentation: a mask for every box, scored by COCO's or LVIS's own average precision.

    blsam evaluate zero-shot --model blsam_vit_t_fine --dataset coco --boxes gt \\
        --annotations instances_val2017.json --images val2017
    blsam evaluate zero-shot --model vit_h --checkpoint sam_vit_h_4b8939.pth --dataset lvis \\
        --boxes lvis_vitdet.json --annotations lvis_v1_val.json --images coco

A detector's file is a list of {image_id, category_id, bbox [x, y, w, h], score}. Class and score stay the detector's;
true boxes have score 1. Writes the masks in COCO's results format.
"""
EVERYTHING = """Everything-mode: how many masks a photo gets, and how many of the annotated objects are among them, by size.

    blsam evaluate everything --model blsam_vit_t_fine --annotations instances_val2017.json --images val2017 --limit 20

The mask generator has SAM's defaults. An object is found where a mask has an IoU of 0.7 with it; crowds are left out.
"""
OVERRIDES = {  # option -> field of the protocol
    "point_sampling": "sampling",
    "select": "select",
    "crowd": "crowd",
    "single_mask": "single_mask",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(required=True, metavar="coco|lvis|zero-shot|everything")
    for name, words in (("coco", COCO), ("lvis", LVIS)):
        summary = f"mean IoU of prompted masks, {words['data']}"
        task = tasks.add_parser(name, help=summary, description=PROMPTED.format(name=name, **words))
        add_prompted_arguments(task)
        task.set_defaults(task=run_prompted, kind=name)
    task = tasks.add_parser("zero-shot", help="average precision of masks for boxes", description=ZERO_SHOT)
    add_zero_shot_arguments(task)
    task.set_defaults(task=run_zero_shot)
    task = tasks.add_parser("everything", help="objects among everything-mode's masks", description=EVERYTHING)
    add_everything_arguments(task)
    task.set_defaults(task=run_everything)


def run(args: argparse.Namespace) -> None:
    """The task that was asked for."""
    if args.seed < 0:
        raise UsageError("--seed is at least 0")
    boxes = getattr(args, "boxes", "gt")
    taken = (args.annotations, args.checkpoint, None if boxes == "gt" else Path(boxes))
    check_output("--json", args.json, taken=taken, suffixes=(".json",))
    check_output("--results", getattr(args, "results", None), taken=(*taken, args.json), suffixes=(".json",))
    if args.output is not None:
        check_folder("--output", args.output)
    args.task(args)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model is measured, and on what."""
    group = parser.add_argument_group("model")
    names = f"{', '.join(MODELS)}, or PACKAGE:NAME of others, as segment_anything:vit_b"
    add_option(group, "--model", required=True, choices=None, default=None, help=names)
    add_option(group, "--checkpoint")
    group.add_argument("--random-weights", action="store_true", help="measure without a checkpoint, seeded by --seed")
    words = "share of tokens that run through the wide blocks; default: the model's own, 0.25 of a bLSAM"
    add_option(group, "--keep-ratio", default=None, help=words)
    add_option(group, "--image-size")
    predictors = ("blsam", "segment_anything")
    group.add_argument("--predictor", choices=predictors, default="blsam", help="the latter passes no extents")
    add_option(group, "--dtype", default="float32")
    add_option(group, "--device")
    add_option(group, "--runtime", default="torch", help="what computes the encoder; default torch")
    add_option(group, "--no-cache")


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


def add_prompted_arguments(parser: argparse.ArgumentParser) -> None:
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


def protocol_of(args: argparse.Namespace) -> tuple[Protocol, str]:
    """The rules asked for, and their name: "paper", or "paper, modified: --select oracle"."""
    if args.num_points < 1 or (args.prompt == "box" and args.num_points > 1):
        raise UsageError("--num-points is at least 1, and goes with --prompt point")
    if args.prompt == "box" and args.point_sampling is not None:
        raise UsageError("--point-sampling goes with --prompt point")
    protocol, changes = PROTOCOLS[args.protocol], []
    for option, field in OVERRIDES.items():
        value = getattr(args, option)
        if value is not None and value != getattr(protocol, field):
            protocol = replace(protocol, **{field: value})
            flag = "--" + option.replace("_", "-")
            switch = {True: flag, False: f"--no-{option}", "always": flag}
            changes.append(switch[value] if value in switch else f"{flag} {value}")
    return protocol, protocol.name + (f", modified: {' '.join(changes)}" if changes else "")


def run_prompted(args: argparse.Namespace) -> None:
    """`blsam evaluate coco` and `lvis`."""
    protocol, name = protocol_of(args)
    annotations = Annotations(args.annotations, args.images, args.kind, args.limit, args.skip_missing)
    subject = load_subject(args)
    settings = {**subject.identity, **data_settings(args, annotations), "prompt": args.prompt}
    settings |= {"num_points": args.num_points, "protocol": name, "rules": asdict(protocol)}

    def predict(photo: Photo, watch: Stopwatch) -> list[dict[str, Any]]:
        targets, _ = annotations.targets(photo, crowd=protocol.crowd, min_area=protocol.min_area)
        if not targets:
            return []
        set_image(subject, photo, watch)
        with watch("decoder"):
            return predict_objects(subject.predictor, targets, protocol, args.prompt, args.num_points, args.seed)

    folder = run_folder(args, f"{args.kind}-{args.prompt}", settings)
    lines, world_size = predicted(args, annotations, predict, folder, settings, subject)
    if lines is None:
        return
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
    if "score_error" in figures:
        rank = "-" if figures["score_rank"] is None else f"{figures['score_rank']:.2f}"
        print(f"predicted IoU: off by {figures['score_error']:.3f} in the mean, rank correlation {rank}")
    finish(args, folder, settings, figures | {"images": len(lines)}, lines, world_size)


# --- instance segmentation -------------------------------------------------------------------------------------------


def add_zero_shot_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser)
    add = parser.add_argument_group("boxes").add_argument
    add("--dataset", choices=("coco", "lvis"), required=True)
    add("--boxes", required=True, metavar="gt|JSON", help="true boxes (score 1), or a detector's results")
    add("--refine", action="store_true", help="feed the most confident mask back once, as the SAM paper does")
    add("--single-mask", action="store_true", help="ask for one mask instead of three")
    add("--results", type=Path, metavar="OUT", help="COCO results json; default results.json in the run folder")


def run_zero_shot(args: argparse.Namespace) -> None:
    """`blsam evaluate zero-shot`."""
    annotations = Annotations(args.annotations, args.images, args.dataset, args.limit, args.skip_missing)
    given = None if args.boxes == "gt" else Path(args.boxes)
    boxes, left_out = true_boxes(annotations) if given is None else read_detections(given, annotations)
    subject = load_subject(args)
    settings = {**subject.identity, **data_settings(args, annotations), "protocol": "zero-shot"}
    settings |= {"dataset": args.dataset, "boxes": "gt" if given is None else sha256(given)[:16]}
    settings |= {"refine": args.refine, "single_mask": args.single_mask}

    def predict(photo: Photo, watch: Stopwatch) -> list[dict[str, Any]]:
        if not boxes[photo.id]:
            return []
        set_image(subject, photo, watch)
        with watch("decoder"):
            return predict_boxes(subject.predictor, boxes[photo.id], single_mask=args.single_mask, refine=args.refine)

    folder = run_folder(args, f"{args.dataset}-zero-shot", settings)
    lines, world_size = predicted(args, annotations, predict, folder, settings, subject)
    if lines is None:
        return
    evaluator = InstanceAP(annotations)
    for photo, line in zip(annotations.photos, lines):
        evaluator.process(photo, line["rows"])
    results = args.results or folder / "results.json"
    write_json(results, evaluator.results, indent=None)
    scores, summary = evaluator.evaluate()
    figures: dict[str, Any] = scores | {"images": len(lines), "masks": len(evaluator.results)}
    figures["left_out"] = {k: n for k, n in sorted((annotations.left_out + left_out).items()) if n}
    print(subject.describe())
    print(zero_shot_rules(args))
    print(zero_shot_counts(annotations, figures, results))
    print(summary)
    finish(args, folder, settings, figures, lines, world_size)


def zero_shot_rules(args: argparse.Namespace) -> str:
    """The rules in one line."""
    source = "true boxes, score 1" if args.boxes == "gt" else f"boxes and scores of {Path(args.boxes).name}"
    masks = "1 mask" if args.single_mask else "3 masks, most confident"
    refined = "one refinement" if args.refine else "no refinement"
    return f"protocol zero-shot: {source}; {masks}; {refined}; crowd ignored in matching; seed {args.seed}"


def zero_shot_counts(annotations: Annotations, figures: dict[str, Any], results: Path) -> str:
    """How many of what, and what was left out."""
    counts = (
        f"{figures['images']} images, {len(annotations.api.anns)} annotations, {figures['masks']} masks in {results}"
    )
    return f"{counts}; {left_out_line(figures['left_out'])}"


# --- everything ------------------------------------------------------------------------------------------------------


def add_everything_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser)
    add = parser.add_argument_group("mask generator").add_argument
    add("--dataset", choices=("coco", "lvis"), default="coco")
    add("--points-per-side", type=int, default=32, metavar="N")
    add("--pred-iou-thresh", type=float, default=0.88, metavar="T")
    add("--stability-score-thresh", type=float, default=0.95, metavar="T")
    add("--found-at", type=float, default=0.7, metavar="IOU", help="of an object and a mask")


def run_everything(args: argparse.Namespace) -> None:
    """`blsam evaluate everything`."""
    if args.points_per_side < 1 or not 0 < args.found_at <= 1:
        raise UsageError("--points-per-side is at least 1, --found-at lies in (0, 1]")
    annotations = Annotations(args.annotations, args.images, args.dataset, args.limit, args.skip_missing)
    subject = load_subject(args)
    names = ("points_per_side", "pred_iou_thresh", "stability_score_thresh")
    options = {name: getattr(args, name) for name in names}
    settings = {**subject.identity, **data_settings(args, annotations), "protocol": "everything"} | options
    generator = generator_of(args, subject, options)

    def predict(photo: Photo, watch: Stopwatch) -> list[dict[str, Any]]:
        image = read_annotated(photo.path, (photo.height, photo.width))
        with watch("masks"):
            return predict_everything(generator, image)

    folder = run_folder(args, f"{args.dataset}-everything", settings)
    lines, world_size = predicted(args, annotations, predict, folder, settings, subject)
    if lines is None:
        return
    evaluator = FoundObjects(annotations, args.found_at)
    for photo, line in zip(annotations.photos, lines):
        evaluator.process(photo, line["rows"])
    figures = evaluator.evaluate() | {"images": len(lines)}
    print(subject.describe())
    print(f"protocol everything: {', '.join(f'{k} {v}' for k, v in options.items())}; found at IoU {args.found_at}")
    print(everything_table(figures))
    finish(args, folder, settings | {"found_at": args.found_at}, figures, lines, world_size)


def generator_of(args: argparse.Namespace, subject: Subject, options: dict[str, Any]) -> Any:
    """The mask generator of the package that the model is of; UsageError if it has none."""
    package = args.model.split(":")[0] if ":" in args.model else args.predictor
    kind = getattr(importlib.import_module(package), "SamAutomaticMaskGenerator", None)
    if kind is None:
        raise UsageError(f"{package} has no SamAutomaticMaskGenerator: it does not have SAM's interface")
    return kind(subject.predictor.model, **options)


# --- shared ----------------------------------------------------------------------------------------------------------


def predicted(
    args: argparse.Namespace,
    annotations: Annotations,
    predict: Callable[[Photo, Stopwatch], list[dict[str, Any]]],
    folder: Path,
    settings: dict[str, Any],
    subject: Subject,
) -> tuple[list[dict[str, Any]] | None, int]:
    """The lines of all photos, None on processes other than the main one; and how many processes there are."""
    with processes() as world:
        lines = predict_photos(
            annotations.photos, predict, folder, settings, subject.device, resume=args.resume, world=world
        )
    return lines, world.size


def set_image(subject: Subject, photo: Photo, watch: Stopwatch) -> None:
    """Encode a photo as its annotations see it."""
    image = read_annotated(photo.path, (photo.height, photo.width))
    with watch("encoder"):
        subject.predictor.set_image(image)


def data_settings(args: argparse.Namespace, annotations: Annotations) -> dict[str, Any]:
    """What identifies the data of a run."""
    return {
        "annotations": sha256(args.annotations)[:16],
        "photos": digest([photo.id for photo in annotations.photos]),
        "seed": args.seed,
        "git_revision": provenance()["git_revision"],
    }


def digest(content: Any) -> str:
    """Of what json holds, 16 characters."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def run_folder(args: argparse.Namespace, task: str, settings: dict[str, Any]) -> Path:
    """The folder asked for, or one named after the settings."""
    if args.output is not None:
        return args.output
    name = args.model.replace(":", "-")
    settings = {key: value for key, value in settings.items() if key != "git_revision"}  # resuming compares it
    return Path("runs") / "eval" / f"{task}-{name}-{digest(settings)[:8]}"


def finish(
    args: argparse.Namespace,
    folder: Path,
    settings: dict[str, Any],
    figures: dict[str, Any],
    lines: list[dict[str, Any]],
    world_size: int,
) -> None:
    """Speed and folder on the screen, everything in the json: figures and settings side by side."""
    rates = speed(lines)
    print(
        "images a second, of one process: "
        + ", ".join(f"{part} {rate:.2f}" for part, rate in rates.items() if rate)
        + f"; predictions in {folder}"
    )
    if args.json:
        write_json(
            args.json, provenance() | figures | settings | {"images_per_second": rates, "processes": world_size}
        )
