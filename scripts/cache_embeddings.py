#!/usr/bin/env python3
"""A teacher's embeddings, computed once, for training without a teacher in memory.

    python scripts/cache_embeddings.py --teacher vit_b --teacher-checkpoint sam_vit_b.pth --data SA-1B --fraction 0.02 \
        --views 2 --output cache
    python scripts/train_sam.py --cache cache --data SA-1B --fraction 0.02 ...

A view of a photo at 1024 takes 2 MB: 470 GB for 2 % of SA-1B and one view, so the live teacher is the default. Training
sees the same --views views of every photo again and again, and needs the same --image-size and --seed. With --stage
encoder, as in that training, photos without a .json beside them are embedded too. A run that was killed goes on when
the same command is given again, and more --views are added to those that are there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from blsam import sam_model_registry
from blsam.data.sa1b import choose_photos, list_photos
from blsam.data.views import ViewSettings
from blsam.files import sha256
from blsam.options import Parser, add_option, check_folder, exit_status, parse_image_size
from blsam.training.embeddings import write_embeddings
from blsam.training.metrics import MOST_DAMAGED
from blsam.training.teachers import TEACHERS, finer_by, load_teacher, placed


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--teacher", choices=TEACHERS, required=True)
    add("--teacher-checkpoint", type=Path, required=True)
    add("--data", type=Path, nargs="+", required=True, metavar="PATH", help="as of train_sam.py")
    add("--stage", choices=("all", "encoder"), default="all", help="as of train_sam.py: encoder needs no .json")
    add("--images", type=Path, metavar="DIR", help="where the photos of a .json lie")
    add("--fraction", type=float, default=1.0, metavar="F", help="a seeded share of the photos, 0.02: 2 %%")
    add_option(parser, "--image-size", default=1024, help="as of train_sam.py")
    add("--teacher-size", type=parse_image_size, metavar="S", help="as of train_sam.py")
    add("--views", type=int, default=1, help="of each photo")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=4)
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--compile", action="store_true", help="torch.compile of the teacher")
    add("--part-size", type=int, default=256, metavar="N", help="views a file")
    add_option(parser, "--device")
    add("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    if min(args.views, args.batch_size, args.part_size) < 1 or not 0 < args.fraction <= 1:
        parser.error("--views, --batch-size and --part-size are at least 1, --fraction lies in (0, 1]")
    check_folder("--output", args.output)

    photos, _ = choose_photos(
        list_photos(args.data, args.images, plain=args.stage == "encoder"), args.fraction, holdout=0, seed=0
    )
    finer, seen = finer_by(args.teacher_size, args.image_size), args.teacher_size or args.image_size
    teacher, decoder = load_teacher(args.teacher, args.teacher_checkpoint, seen)
    sam = sam_model_registry["vit_t"](image_size=args.image_size, device=args.device)  # for its preprocessing
    settings = {"teacher": args.teacher, "teacher_sha256": sha256(args.teacher_checkpoint)}
    settings |= {"image_size": args.image_size, "teacher_size": seen, "views": args.views, "seed": args.seed}
    total = len(photos) * args.views
    print(f"{total} views, {total * 512 * (seen // 16) ** 2 / 1e9:.1f} GB", file=sys.stderr)
    damaged: list[str] = []
    writing = write_embeddings(
        args.output,
        placed(teacher, args.device, args.compile),
        decoder,
        sam,
        photos,
        # 1 object, or crops would be drawn otherwise
        ViewSettings(args.image_size, 1, args.seed, args.views, finer=finer),
        settings,
        batch_size=args.batch_size,
        part_size=args.part_size,
        device=args.device,
        bf16=args.precision == "bf16",
    )
    with tqdm(total=total, unit="view", disable=not sys.stderr.isatty()) as bar:
        for found in writing:
            damaged += found
            bar.update(args.batch_size)
            if len(damaged) > MOST_DAMAGED * total:
                raise ValueError(f"{len(damaged)} of {total} views are of damaged photos, the first {damaged[0]}")
    for line in damaged:
        print(f"damaged: {line}", file=sys.stderr)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("cache_embeddings", main))
