"""How far bfloat16 moves the embedding and the choice of prime tokens, on photos, for several keep ratios.

python -m scripts.benchmarks.compare_precision --images val2017 --limit 50
python -m scripts.benchmarks.compare_precision --model blsam_vit_b --checkpoint mine.safetensors --images val2017
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from blsam import SamPredictor, sam_model_registry
from blsam.files import write_json
from blsam.images import photos_in, read_image
from blsam.modeling.windows import real_tokens
from blsam.options import Parser, add_option, check_output, exit_status, find_checkpoint, parse_ratios


@torch.no_grad()
def main() -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_option(parser, "--model", default="blsam_vit_t")
    add_option(parser, "--checkpoint")
    add("--images", type=Path, required=True, metavar="DIR")
    add("--limit", type=int, default=50)
    add_option(parser, "--image-size")
    add("--keep-ratios", type=parse_ratios, default=[0.1, 0.25, 0.5])
    add("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    if not args.images.is_dir():
        raise FileNotFoundError(f"no folder {args.images}")
    photos = photos_in(args.images)[: args.limit]
    if not photos:
        raise FileNotFoundError(f"no photo in {args.images}")

    checkpoint = find_checkpoint(args.model, args.checkpoint)
    check_output("--json", args.json, taken=(checkpoint, *photos))
    sam = sam_model_registry[args.model](checkpoint, image_size=args.image_size)
    full, half = sam.image_encoder, copy.deepcopy(sam.image_encoder).use_dtype(torch.bfloat16)
    transform, side = SamPredictor(sam).transform, sam.prompt_encoder.image_embedding_size[0]
    found = {keep: {"cosine": [], "same_prime_tokens": []} for keep in args.keep_ratios}
    for path in tqdm(photos, unit="photo", disable=not sys.stderr.isatty()):
        resized = torch.as_tensor(transform.apply_image(read_image(path))).permute(2, 0, 1)
        size = tuple(resized.shape[-2:])
        real = real_tokens(side, side, torch.tensor([size]), full.img_size // side)
        for keep, values in found.items():
            options = {"true_sizes": [size], "keep_ratio": keep}
            (a, routed), (b, routed_half) = (e.encode(sam.preprocess(resized)[None], **options) for e in (full, half))
            values["cosine"].append(F.cosine_similarity(a, b, dim=1)[real].mean().item())
            shares = [
                (one.mask & other.mask).sum().item() / one.mask.sum().item()
                for one, other in zip(routed.stages, routed_half.stages)
            ]
            values["same_prime_tokens"].append(shares)
    report = []
    for keep, values in found.items():
        cosine = torch.tensor(values["cosine"])
        same = torch.tensor(values["same_prime_tokens"]).mean(0).tolist()
        report.append({"keep_ratio": keep, "cosine": cosine.mean().item(), "least": cosine.min().item(), "same": same})
        text = ", ".join(f"{100 * share:.1f}" for share in same) or "-"
        print(
            f"keep {keep:g}: cosine {cosine.mean():.5f} (least {cosine.min():.5f}), same prime tokens by stage {text} %"
        )
    if args.json:
        write_json(args.json, {"model": args.model, "photos": len(photos), "by_keep_ratio": report})
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("compare_precision", main))
