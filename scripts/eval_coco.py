#!/usr/bin/env python3
"""Mean IoU of prompted masks on COCO annotations, by size, beside trivial baselines.

    python scripts/eval_coco.py --model blsam_vit_t --annotations instances_val2017.json --images val2017
    python scripts/eval_coco.py --model blsam_vit_t ... --prompt point --num-points 3
    python scripts/eval_coco.py --model segment_anything:vit_b --checkpoint sam_vit_b_01ec64.pth ...
    torchrun --nproc-per-node 8 scripts/eval_coco.py ...          # the same tables, images shared out

Protocols: `paper` (points uniform in the mask, all at once; three masks, the most confident; no crowd), `efficientvit`
(RITM clicks, crowd included), `sam` (centre, then farthest error, logits fed back). A run that was killed goes on with
--resume.
"""

from blsam.evaluation.commands import run_prompted, run_script

if __name__ == "__main__":
    run_script("eval_coco", lambda: run_prompted("coco", __doc__))
