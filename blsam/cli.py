"""The command `blsam`: `segment` makes a mask from clicks or a box, `demo` shows a page to click on, `calibrate` makes a
model, `models` lists what there is."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from . import checkpoint as ckpt
from .build_sam import sam_model_registry
from .config import CONFIGS
from .images import encode_image, read_image
from .modeling.macs import encoder_macs, sam_macs
from .precision import DTYPES, resolve_dtype
from .predictor import SamPredictor, check_prompts, points_outside
from .records import mask_record
from .visualize import draw_mask

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
DEFAULT_MODEL = "blsam_vit_t"


class UsageError(ValueError):
    """Something the user can put right; printed in one line, exit status 2."""


def shipped_checkpoint(model: str) -> Path:
    """Where the repository keeps the weights of a model that ships with it."""
    return SHIPPED / f"{model}.safetensors"


def find_checkpoint(model: str, given: Path | None) -> Path:
    """The checkpoint asked for, or the one that ships; UsageError says where weights come from."""
    if given is not None:
        return given
    path = shipped_checkpoint(model)
    if path.is_file():
        return path
    if model.endswith("vit_t"):
        raise UsageError(f"{path} is missing; take it from checkpoints/ of the blsam repository, or name --checkpoint")
    raise UsageError(f"no weights ship for {model}; give --checkpoint (SAM's weights fit, see checkpoints/README.md)")


def parse_point(text: str) -> tuple[float, float, int]:
    """X,Y or X,Y,LABEL."""
    parts = text.split(",")
    try:
        x, y = float(parts[0]), float(parts[1])
        label = int(parts[2]) if len(parts) > 2 else 1
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"a point is X,Y or X,Y,LABEL, got {text!r}") from None
    if len(parts) > 3 or label not in (0, 1) or not np.isfinite([x, y]).all():
        raise argparse.ArgumentTypeError(f"a point is X,Y or X,Y,LABEL with label 0 or 1, got {text!r}")
    return x, y, label


def parse_box(text: str) -> tuple[float, float, float, float]:
    """X1,Y1,X2,Y2."""
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a box is X1,Y1,X2,Y2, got {text!r}") from None
    return x1, y1, x2, y2


def parse_device(text: str) -> torch.device:
    """A device that is there: cpu, cuda, cuda:1, mps; "cuda" is this process's own GPU under torchrun."""
    if text == "cuda":
        text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here ({str(error).splitlines()[0]})") from None
    return device


def dtype_name(args: argparse.Namespace) -> str:
    """The --dtype asked for, "auto" decided for the --device."""
    return str(resolve_dtype(args.dtype, args.device)).removeprefix("torch.")


def segment(args: argparse.Namespace) -> None:
    """One prompt on one photo: overlay, mask and json."""
    if not args.point and args.box is None:
        raise UsageError("nothing to segment: give --point X,Y or --box X1,Y1,X2,Y2")
    checkpoint = find_checkpoint(args.model, args.checkpoint)
    for path in (args.output, args.mask):
        if path is not None and path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise UsageError(f"{path}: a picture ends in .png or .jpg")
    image = read_image(args.image)
    points = np.array([p[:2] for p in args.point], float) if args.point else None
    labels = np.array([p[2] for p in args.point]) if args.point else None
    box = np.array(args.box) if args.box else None
    check_prompts(points, labels, box, None, image.shape[:2])
    for x, y in points_outside(points, image.shape[:2]):
        raise UsageError(f"point {x:g},{y:g} lies outside the image of {image.shape[1]} x {image.shape[0]} pixels")

    build = sam_model_registry[args.model]
    sam = build(checkpoint, image_size=args.image_size, keep_ratio=args.keep_ratio, dtype=dtype_name(args))
    predictor = SamPredictor(sam.to(args.device))
    start = time.perf_counter()
    predictor.set_image(image)
    encoded = time.perf_counter()
    masks, scores, _ = predictor.predict(points, labels, box)
    decoded = time.perf_counter()

    records = [mask_record(mask, score) for mask, score in zip(masks, scores)]
    best, *others = (records[i] for i in np.argsort(-scores, kind="stable"))
    seconds = {"encoder": round(encoded - start, 4), "decoder": round(decoded - encoded, 4)}
    output = args.output or Path(f"{args.image.stem}_mask.png")
    mask = masks[scores.argmax()]
    _write_picture(output, draw_mask(image, mask, args.point or [], args.box))
    if args.mask is not None:
        _write_picture(args.mask, mask.astype(np.uint8) * 255)
    if args.json is not None:
        text = json.dumps({**best, "seconds": seconds, "candidates": others}, indent=1)
        ckpt.write_atomically(args.json, lambda path: Path(path).write_text(text + "\n"))
    print(
        f"{output}: score {best['score']:.3f}, {best['area']} pixels, encoder {seconds['encoder']:.2f} s, "
        f"decoder {seconds['decoder']:.2f} s"
    )


def _write_picture(path: Path, pixels: np.ndarray) -> None:
    data = encode_image(pixels, "PNG" if path.suffix.lower() == ".png" else "JPEG")
    ckpt.write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))


def demo(args: argparse.Namespace) -> None:
    """A page to click on, until Ctrl-C."""
    checkpoint = find_checkpoint(args.model, args.checkpoint)
    try:
        from .demo import page
        from .demo.segmenter import Segmenter
    except ModuleNotFoundError as error:
        raise UsageError(f"the page needs {error.name}: pip install -e '.[demo]'") from None
    if not 0.01 <= args.keep_ratio <= 1:
        raise UsageError("the keep ratio of the page lies between 0.01 and 1")
    listener = page.bind(args.host, args.port)
    build = sam_model_registry[args.model]
    sam = build(checkpoint, image_size=args.image_size, keep_ratio=args.keep_ratio, dtype=dtype_name(args))
    segmenter = Segmenter(sam.to(args.device))
    segmenter.warm_up()
    page.serve(page.build_app(segmenter, args.model, args.keep_ratio), listener)


def models(args: argparse.Namespace) -> None:
    """A table of the registry, GMACs at 1024."""
    print(f"{'model':<12} {'parameters':>11} {'GMACs SAM':>10} {'GMACs ours':>11} {'keep ratio':>11}  weights")
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            sam = sam_model_registry[name]()
        parameters = sum(p.numel() for p in sam.parameters()) / 1e6
        keep = f"{sam.image_encoder.keep_ratio:g}" if config.routed else "-"
        has = "shipped" if shipped_checkpoint(name).is_file() else "-"
        dense, ours = sam_macs(config.dense) / 1e9, encoder_macs(config) / 1e9
        print(f"{name:<12} {parameters:>9.1f} M {dense:>10.1f} {ours:>11.1f} {keep:>11}  {has}")
    auto = str(resolve_dtype("auto")).removeprefix("torch.")
    print(
        f"dtype auto on this processor: {auto}"
        + (f", on its GPU: {_gpu_dtype()}" if torch.cuda.is_available() else "")
    )
    print("GMACs of the encoder at 1024 x 1024: the dense model as segment_anything computes it, and ours")


def _gpu_dtype() -> str:
    return str(resolve_dtype("auto", "cuda")).removeprefix("torch.")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blsam", description="Segment Anything with a big.LITTLE image encoder")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    seg = commands.add_parser("segment", help="a mask from clicks or a box")
    add = seg.add_argument
    add("image", type=Path)
    add("--point", type=parse_point, action="append", metavar="X,Y[,0|1]", help="click; 1 object, 0 background")
    add("--box", type=parse_box, metavar="X1,Y1,X2,Y2", help="pixels of the image, as the points")
    _add_model(seg)
    add("-o", "--output", type=Path, metavar="OUT.png", help="overlay; default IMAGE_mask.png")
    add("--mask", type=Path, metavar="OUT.png", help="the mask alone, 0 and 255")
    add("--json", type=Path, metavar="OUT.json")
    seg.set_defaults(run=segment)
    web = commands.add_parser("demo", help="a page to click on, on this machine")
    web.add_argument("--port", type=int, default=7860, help="0: any that is free")
    web.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets the whole network in; default: this machine")
    _add_model(web)
    web.set_defaults(run=demo)
    from .training import calibrate  # which needs what is defined here

    fit = commands.add_parser(
        "calibrate", help="a blsam model from a SAM checkpoint and a few photos, without training"
    )
    calibrate.add_arguments(fit)
    fit.set_defaults(run=calibrate.command)
    listing = commands.add_parser("models", help="names, sizes, costs, and which weights are present")
    listing.set_defaults(run=models)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=sorted(CONFIGS), default=DEFAULT_MODEL)
    add("--checkpoint", type=Path, help="default: the one that ships")
    add("--keep-ratio", type=float, default=0.25, help="share of tokens that run through the wide blocks")
    add("--image-size", type=int, help="side of the model's input, a multiple of 16; default: the checkpoint's")
    add("--device", type=parse_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--dtype", choices=DTYPES, default="auto", help="of the encoder; auto: bfloat16 where there is hardware for it"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        print(f"blsam: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
