#!/usr/bin/env python3
r"""Zero-shot instance segmentation: a mask for every box, scored by COCO's or LVIS's own average precision.

    python scripts/eval_zero_shot.py --model blsam_vit_t --dataset coco --boxes gt \
        --annotations instances_val2017.json --images val2017
    python scripts/eval_zero_shot.py --model vit_h --checkpoint sam_vit_h_4b8939.pth --dataset lvis \
        --boxes lvis_vitdet.json --annotations lvis_v1_val.json --images coco

A detector's file is a list of {image_id, category_id, bbox [x, y, w, h], score}. Class and score stay the detector's;
true boxes have score 1. Writes the masks in COCO's results format.
"""

from blsam.evaluation.commands import run_script, run_zero_shot

if __name__ == "__main__":
    run_script("eval_zero_shot", lambda: run_zero_shot(__doc__))
