"""What a checkpoint holds and which models it fits; the same weights for another model, image size, type or format.

    blsam convert sam_vit_b_01ec64.pth --info
    blsam convert sam_vit_b_01ec64.pth --model blsam_vit_b -o start.safetensors    # a start: then blsam calibrate
    blsam convert blsam_vit_b.safetensors --half -o small.safetensors
    blsam convert model.safetensors -o sam.pth                                    # of Hugging Face's SamModel, to SAM's

Reads what the builders read: SAM's files, ours, Hugging Face's, out of wrappers and prefixes. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import SUFFIXES
from ..config import CONFIGS
from ..files import printable, sha256, write_json
from ..options import UsageError, add_option, check_output

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path)
    add("--info", action="store_true", help="say what is in it, and write nothing")
    add_option(parser, "--model", default=None, help="default: the one that the file fits as it is")
    add_option(parser, "--image-size")
    add("--half", action="store_true", help="half precision: half the size; computed in float32 all the same")
    add("--seed", type=int, default=0, help="of what a start adds to SAM's weights")
    add("--json", type=Path, metavar="OUT", help="with --info")
    add("-o", "--output", type=Path, metavar="FILE", help=f"ends in {', '.join(SUFFIXES)}")


def run(args: argparse.Namespace) -> None:
    """Describe the file, or write it anew."""
    if args.info == (args.output is not None):
        raise UsageError("give --info, or -o FILE to write")
    if args.info and (args.model or args.image_size or args.half):
        raise UsageError("--info only looks: --model, --image-size and --half go with -o")
    if args.json is not None and not args.info:
        raise UsageError("--json goes with --info")
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed lies between 0 and 2**63 - 1, is {args.seed}")
    check_output("--output", args.output, taken=(args.file,), what="a checkpoint", suffixes=SUFFIXES)
    check_output("--json", args.json, taken=(args.file,), suffixes=(".json",))

    from ..checkpoint import read

    state, metadata = read(args.file, CONFIGS[args.model] if args.model else None)
    fits = models_that_fit(state, args.file)
    if args.info:
        info = describe_file(args.file, state, metadata, fits)
        print(as_text(args.file, info))
        if args.json is not None:
            write_json(args.json, info)
        return
    convert(args, state, metadata, fits)


@dataclass(frozen=True)
class Fit:
    """A model that a state loads into; new: how many of its keys the state does not have."""

    model: str
    new: int


def models_that_fit(state: dict[str, torch.Tensor], source: Path) -> list[Fit]:
    """The models that a state loads into, those it fills wholly first; CheckpointError if there is none."""
    import torch

    from ..build_sam import build_sam
    from ..checkpoint import CheckpointError, check_fits, image_size_of, load

    found, sizes, keys = [], [], []
    for config in CONFIGS.values():
        try:
            check_fits(state, config, str(source))
        except CheckpointError as error:
            sizes.append(error)
            continue
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that nothing is copied, which is meant
                sam = build_sam(config, image_size=image_size_of(state))
                found.append(Fit(config.name, len(load(sam, config, state, str(source)))))
        except CheckpointError as error:
            keys.append(error)
    if not found:  # of a model's width and depth, what is wrong with the keys
        raise (keys + sizes)[0]
    return sorted(found, key=lambda fit: fit.new > 0)


def describe_file(
    path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str], fits: list[Fit]
) -> dict[str, Any]:
    """What there is to say of a checkpoint."""
    from ..checkpoint import image_size_of

    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    return {
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "sha256": sha256(path),
        "tensors": len(state),
        "parameters": sum(value.numel() for value in state.values()),
        "dtypes": kinds,
        "image_size": image_size_of(state),
        "fits": [fit.model for fit in fits if not fit.new],
        "is_a_start_for": {fit.model: fit.new for fit in fits if fit.new},
        "metadata": {key: plain(value) for key, value in metadata.items()},
    }


def plain(text: str) -> Any:
    """What a value of a file's metadata was before it became text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def as_text(path: Path, info: dict[str, Any]) -> str:
    from ..training.calibrate import table

    lines = [
        f"{path}: {info['megabytes']:g} MB, sha256 {info['sha256']}",
        f"holds   {info['parameters'] / 1e6:.1f} M numbers in {info['tensors']} tensors, {', '.join(info['dtypes'])}; "
        f"made for images of {info['image_size']}",
        f"fits    {', '.join(info['fits']) or 'no model as it is'}",
    ]
    for model, new in info["is_a_start_for"].items():
        lines.append(f"starts  {model}, then {makes(model)} ({new} new tensor{'s' if new > 1 else ''})")
    said = {key: value for key, value in info["metadata"].items() if key not in ("format", "calibration")}
    if said:
        lines.append("says    " + ", ".join(f"{printable(key)} {printable(value)}" for key, value in said.items()))
    report = info["metadata"].get("calibration")
    try:
        lines += [f"calibrated on {int(report['photos'])} photos:", table(report)]
    except (TypeError, KeyError, IndexError, ValueError):  # none, or not one of ours
        pass
    return "\n".join(lines)


def convert(
    args: argparse.Namespace, state: dict[str, torch.Tensor], metadata: dict[str, str], fits: list[Fit]
) -> None:
    """Build the model, at its own image size or another, and save it; half precision stays what it is."""
    import torch

    from ..build_sam import build_sam
    from ..checkpoint import image_size_of, load, save

    fit = chosen(args.model, fits)
    config = CONFIGS[fit.model]
    torch.manual_seed(args.seed)  # of what is new
    sam = build_sam(config, image_size=args.image_size or image_size_of(state))
    load(sam, config, state, str(args.file))
    facts = metadata if metadata.get("model") == config.name else {}
    if facts.get("image_size") != str(sam.image_encoder.img_size):  # measured at another size
        facts = {key: value for key, value in facts.items() if key != "calibration"}
    facts = facts | {"model": config.name, "image_size": str(sam.image_encoder.img_size)}
    half = args.half or {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float16}
    save(args.output, sam.state_dict(), facts, torch.float16 if half else None)
    megabytes = args.output.stat().st_size / 1e6
    line = f"{args.output}: {fit.model} at {sam.image_encoder.img_size}, {megabytes:.1f} MB"
    if fit.new:
        line += (
            f"; a start, with {fit.new} new tensor{'s' if fit.new > 1 else ''}: {makes(config.name)} makes it of use"
        )
    print(line)


def makes(model: str) -> str:
    """The commands that make a model out of a start."""
    return "blsam calibrate or train" if CONFIGS[model].routed else "blsam train"


def chosen(model: str | None, fits: list[Fit]) -> Fit:
    """The model asked for, or the only one that the file fills."""
    if model is None:
        whole = [fit for fit in fits if not fit.new]
        if len(whole) != 1:
            raise UsageError(f"the file fits {' and '.join(fit.model for fit in whole or fits)}; say which by --model")
        return whole[0]
    found = next((fit for fit in fits if fit.model == model), None)
    if found is None:
        raise UsageError(f"the file does not fit {model}; it fits {', '.join(fit.model for fit in fits)}")
    return found
