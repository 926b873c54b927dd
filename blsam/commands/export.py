"""Encoder and decoder as files that run without torch, or that labelling tools open; each is checked against torch.

    blsam export -o exported                                          # for blsam.onnx, the model that ships
    blsam export --model blsam_vit_b --checkpoint FILE --for anylabeling -o exported
    blsam export --format openvino -o exported

A file whose values are not torch's, on three photos with clicks, boxes and masks, is not left there: exit status 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.tools import TOOLS, Tool, anylabeling_yaml
from ..files import provenance, sha256, write_json, write_text
from ..options import UsageError, add_option, check_folder, check_output, find_checkpoint, one_line
from ..runtimes.choice import require

if TYPE_CHECKING:
    from ..modeling.sam import Sam

PARTS = ("encoder", "decoder")
CELLS = 64  # of CVAT's embedding, along a side
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime", "skimage"), "openvino": ("openvino",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_option(parser, "--model")
    add_option(parser, "--checkpoint")
    add_option(parser, "--keep-ratio")
    add_option(parser, "--image-size")
    add("--what", choices=(*PARTS, "both"), default="both", help="default: both")
    add("--format", choices=("onnx", "openvino"), default="onnx", help="default: onnx")
    add("--for", dest="tool", choices=tuple(TOOLS), default="blsam", help="the tool that will open the files")
    add("--json", type=Path, metavar="OUT", help="sizes, seconds and differences")
    add("-o", "--output", type=Path, required=True, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Export, check, and move into place what holds; a line for each file."""
    tool, parts = TOOLS[args.tool], PARTS if args.what == "both" else (args.what,)
    if not tool.has_encoder:
        if args.what == "encoder":
            raise UsageError(
                f"--for {args.tool}: its server encodes in torch and reads no encoder; give --what decoder"
            )
        parts = ("decoder",)
    if args.format == "openvino" and args.tool != "blsam":
        raise UsageError(f"--for {args.tool} reads ONNX; leave out --format openvino")
    require(*NEEDED["onnx"], *(NEEDED["openvino"] if args.format == "openvino" else ()))
    checkpoint = find_checkpoint(args.model, args.checkpoint)
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"--output {args.output} is a file; name a folder")
    check_folder("--output", args.output)
    suffixes = (".onnx", ".onnx.data") if args.format == "onnx" else (".xml", ".bin")
    for path in (args.output / f"{args.model}.{part}{suffix}" for part in parts for suffix in suffixes):
        check_output("--output", path, taken=(checkpoint,))
    check_output("--json", args.json, taken=(checkpoint,), suffixes=(".json",))

    from ..build_sam import sam_model_registry
    from ..modeling.windows import PATCH

    sam = sam_model_registry[args.model](checkpoint, image_size=args.image_size, keep_ratio=args.keep_ratio)
    size = sam.image_encoder.img_size
    if tool.cut and sam.prompt_encoder.image_embedding_size != (CELLS, CELLS):
        raise UsageError(
            f"--for {args.tool}: its page takes embeddings of {CELLS} x {CELLS} cells, {args.model} at {size} has "
            f"{sam.prompt_encoder.image_embedding_size[0]} a side; give --image-size "
            f"{CELLS * PATCH // sam.image_encoder.config.grow}"
        )
    facts = {"model": args.model, "image_size": str(size), "for": args.tool, "checkpoint_sha256": sha256(checkpoint)}
    if sam.image_encoder.config.routed:
        facts["keep_ratio"] = f"{args.keep_ratio:g}"
    args.output.mkdir(parents=True, exist_ok=True)
    reports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.output, prefix=".export-") as folder:
        lines = []
        for part in parts:
            line = one_part(sam, tool, part, Path(folder), args, facts, reports)
            if line is None:
                return 1
            lines.append(line)
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, args.output / path.name)
    print("\n".join(lines))
    if args.tool == "anylabeling" and len(parts) == 2:
        names = [f"{args.model}.{part}.onnx" for part in parts]
        write_text(args.output / f"{args.model}.yaml", anylabeling_yaml(args.model, *names))
        print(f"{args.output / f'{args.model}.yaml'}: load it in AnyLabeling as a custom model")
    if args.json is not None:
        write_json(args.json, {**facts, "files": reports, **provenance()})
    return 0


def one_part(
    sam: Sam,
    tool: Tool,
    part: str,
    folder: Path,
    args: argparse.Namespace,
    facts: dict[str, str],
    reports: dict[str, Any],
) -> str | None:
    """Write the encoder or the decoder into `folder`; what is to be said of it, None where it is not torch's.

    ValueError where it cannot be made or run.
    """
    from ..export import check, write

    path = folder / f"{args.model}.{part}.onnx"
    print(f"blsam export: {part} ...", file=sys.stderr)
    began = time.perf_counter()
    facts = facts | {"part": part}
    try:
        if part == "encoder":
            write.encoder_onnx(sam.image_encoder, tool, path, facts)
        else:
            write.decoder_onnx(sam, tool, path, facts)
        if args.format == "openvino":
            path = write.to_openvino(path, path.with_suffix(".xml"), facts)
        seconds = time.perf_counter() - began
        found = (check.check_encoder if part == "encoder" else check.check_decoder)(sam, tool, check.runner(path))
    except Exception as error:  # the exporters' and the runtimes' own have no common base
        raise ValueError(f"the {part} could not be exported as {args.format}: {one_line(error)}") from error
    same = (
        ""
        if found.same is None
        else f", {found.same:.3%} of {'prime tokens' if part == 'encoder' else 'pixels'} torch's"
    )
    line = f"largest difference {found.difference:.1e} of the deviation{same}"
    megabytes = sum(file.stat().st_size for file in write.files_of(path)) / 1e6
    if not found.holds:
        print(f"blsam export: {path.name} does not give what torch gives: {line}; nothing is written", file=sys.stderr)
        return None
    reports[path.name] = {"megabytes": round(megabytes, 1), "seconds": round(seconds, 1), **asdict(found)}
    return f"{args.output / path.name}: {megabytes:.1f} MB, {seconds:.0f} s; {line}"
