#!/usr/bin/env python3
"""Mean IoU of prompted masks on LVIS annotations (v1 or v0.5), by size, beside trivial baselines.

    python scripts/eval_lvis.py --model blsam_vit_t --annotations lvis_v1_val.json --images coco
    python scripts/eval_lvis.py --model blsam_vit_t ... --prompt point --num-points 3
    torchrun --nproc-per-node 8 scripts/eval_lvis.py ...          # the same tables, images shared out

LVIS v1 val has images of train2017 and of val2017: --images is the folder that holds both. Protocols as in
`eval_coco.py`; LVIS has no crowd annotations.
"""

from blsam.evaluation.commands import run_prompted, run_script

if __name__ == "__main__":
    run_script("eval_lvis", lambda: run_prompted("lvis", __doc__))
