#!/usr/bin/env python3
"""Train a dense SAM, or a bLSAM against a dense teacher, on SA-1B, on photos of your own, on COCO or LVIS.

    # a bLSAM: start from a calibrated one, L = L_sup + 2.5 L_fd, elastic keep ratio
    python scripts/train_sam.py --model blsam_vit_b --init blsam_vit_b.safetensors --teacher vit_b \
        --teacher-checkpoint sam_vit_b.pth --data SA-1B --fraction 0.02 --keep-ratio 0.1,0.15,0.25,0.35,0.5 \
        --epochs 10 --batch-size 8 --precision bf16 --output runs/blsam_vit_b

    # the same on 8 GPUs of one machine; what breaks off is started again and goes on
    torchrun --nproc-per-node 8 --max-restarts 3 scripts/train_sam.py ... --batch-size 64

    # an image encoder alone, to be used with the teacher's decoder (here MobileSAM's, which is SAM's)
    python scripts/train_sam.py --stage encoder --model vit_t --init vit_t.safetensors --teacher mobile_sam \
        --teacher-checkpoint mobile_sam.pt --distill-loss mse --data PHOTOS --image-size 512 --minutes 45 --output runs/e

    # the mask decoder alone, on COCO-style annotations of your own
    python scripts/train_sam.py --train decoder --model blsam_vit_t --init blsam_vit_t.safetensors \
        --data annotations.json --images PHOTOS --image-size 512 --epochs 3 --output runs/mine

The run folder holds settings, git revision and versions (`config.json`), the ids of its photos, `metrics.jsonl`
(TensorBoard too, if it is installed), the last checkpoint (`checkpoints/step-N`, for `--resume` with any number of
processes), and the moving average of the weights in half precision for `sam_model_registry` (`model.safetensors`, and
`best.safetensors` by validation). Ctrl-C and SIGTERM write all of it and exit; after a kill the last --save-every
steps are lost. Views and prompts are drawn from (seed, epoch, photo) and keep ratios from (seed, step), so a run that
was resumed sees what it would have seen.
"""

from __future__ import annotations

from blsam.evaluation.commands import run_script
from blsam.training.loop import train
from blsam.training.settings import build_parser, parse_settings


def main(argv: list[str] | None = None) -> int:
    print(train(parse_settings(build_parser(__doc__), argv)))
    return 0


if __name__ == "__main__":
    run_script("train_sam", main)
