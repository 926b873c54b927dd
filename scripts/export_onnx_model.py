#!/usr/bin/env python3
"""SAM's export_onnx_model.py with its own options: the decoder as ONNX; `blsam export` writes encoders too.

python scripts/export_onnx_model.py --checkpoint sam_vit_b_01ec64.pth --model-type vit_b --output decoder.onnx

Unlike SAM's, the file is right for photos of any shape, and it is compared with torch before it is left there.
"""

import sys
import tempfile
from pathlib import Path

import torch

from blsam import sam_model_registry
from blsam.commands.export import require
from blsam.export.check import MOST, gap, runner
from blsam.export.graphs import OPSET, DecoderGraph
from blsam.export.tools import OUTPUTS, Tool
from blsam.export.write import graph_onnx
from blsam.options import OPTIONS, Parser, UsageError, add_option, check_output, exit_status, find_checkpoint

METRICS = ("masks", "iou_predictions", "stability_scores", "areas", "low_res_masks")  # SAM's with extra ones
SHAPES = ((480, 640), (640, 480), (300, 300))  # of photos that the file is tried with


def main() -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_option(parser, "--checkpoint", required=True, help=None)
    add("--output", type=Path, required=True, metavar="FILE.onnx")
    add("--model-type", choices=("default", *OPTIONS["--model"]["choices"]), required=True)
    add_option(parser, "--image-size")
    add("--return-single-mask", action="store_true", help="the best mask alone")
    add("--opset", type=int, default=OPSET)
    add("--quantize-out", type=Path, metavar="FILE.onnx", help="the same with weights of 8 bits, by onnxruntime")
    add("--gelu-approximate", action="store_true", help="GELU by tanh, for runtimes without erf")
    add("--use-stability-score", action="store_true", help="in place of the predicted IoU")
    add("--return-extra-metrics", action="store_true", help="stability scores and areas too")
    args = parser.parse_args()
    require("onnx", "onnxruntime")
    checkpoint = find_checkpoint(args.model_type, args.checkpoint)
    for option, path, other in (
        ("--output", args.output, args.quantize_out),
        ("--quantize-out", args.quantize_out, args.output),
    ):
        check_output(option, path, taken=(checkpoint, other), suffixes=(".onnx",))
    if not 11 <= args.opset <= OPSET:
        raise UsageError(f"--opset lies between 11 and {OPSET}, is {args.opset}")

    sam = sam_model_registry[args.model_type](checkpoint, image_size=args.image_size)
    tool = Tool(single=args.return_single_mask)
    graph = DecoderGraph(sam, tool, args.use_stability_score, args.return_extra_metrics).eval()
    if args.gelu_approximate:
        for module in graph.modules():
            if isinstance(module, torch.nn.GELU):
                module.approximate = "tanh"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".export-") as folder:
        path = Path(folder) / args.output.name
        graph_onnx(
            graph, METRICS if args.return_extra_metrics else OUTPUTS, path, {"model": args.model_type}, args.opset
        )
        difference = largest_difference(graph, path)
        if difference > MOST:
            print(f"export_onnx_model: the file is {difference:.1e} off torch; nothing is written", file=sys.stderr)
            return 1
        if args.quantize_out is not None:
            quantize(path, args.quantize_out)
        path.replace(args.output)
    print(f"{args.output}: largest difference {difference:.1e} of the deviation")
    return 0


@torch.no_grad()
def largest_difference(graph: DecoderGraph, path: Path) -> float:
    """Of logits and scores, over the deviation of torch's, on random embeddings and photos of several shapes."""
    run, found = runner(path), []
    for shape in SHAPES:
        inputs = graph.example() | {"orig_im_size": torch.tensor(shape, dtype=torch.float32)}
        outputs = run({name: value.numpy() for name, value in inputs.items()})
        expected = graph(*inputs.values())
        for place in (0, 1, -1):  # masks, scores, logits
            one, other = torch.from_numpy(outputs[place]), expected[place]
            found.append(gap(one, other) if other.numel() > 1 else float((one - other).abs().max()))
    return max(found)


def quantize(path: Path, output: Path) -> None:
    """Weights of 8 bits, as SAM's script makes them."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    output.parent.mkdir(parents=True, exist_ok=True)
    quantize_dynamic(path, output, per_channel=False, reduce_range=False, weight_type=QuantType.QUInt8)
    print(f"{output}: with weights of 8 bits, not compared")


if __name__ == "__main__":
    sys.exit(exit_status("export_onnx_model", main))
