#!/usr/bin/env bash
# Every evaluation figure of docs/evaluation.md, measured again and compared with what is committed.
#
#     BLSAM_DATA=DATA scripts/evaluate_shipped.sh [NAME...]      # a row takes some minutes
#     UPDATE=1 scripts/evaluate_shipped.sh [NAME...]             # make the measured figures the expected ones
#
# DATA holds coco/instances_val2017.json, coco/val2017/, lvis/lvis_v0.5_val.json and lvis/val2017/.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${BLSAM_DATA:-../shared/data}
coco=(--annotations "$data/coco/instances_val2017.json" --images "$data/coco/val2017")
lvis=(--annotations "$data/lvis/lvis_v0.5_val.json" --images "$data/lvis")
failed=0

evaluate() { # name, script, options
  local name=$1 script=$2
  shift 2
  if [ ${#only[@]} -gt 0 ] && [[ " ${only[*]} " != *" $name "* ]]; then return; fi
  echo "== $name: scripts/$script.py $*"
  python "scripts/$script.py" "$@" --output "runs/shipped/$name" --json "runs/shipped/$name.json"
  if [ -n "${UPDATE:-}" ]; then
    mkdir -p scripts/expected
    cp "runs/shipped/$name.json" "scripts/expected/$name.json"
  else
    python scripts/check_results.py "runs/shipped/$name.json" "scripts/expected/$name.json" || failed=1
  fi
}

only=("$@")
for name in "${only[@]}"; do
  grep -q "^evaluate $name " scripts/evaluate_shipped.sh || { echo "no measurement is called $name" >&2; exit 2; }
done
evaluate coco_box eval_coco --model blsam_vit_t "${coco[@]}"
evaluate coco_box_single eval_coco --model blsam_vit_t "${coco[@]}" --single-mask
evaluate coco_box_dense eval_coco --model vit_t "${coco[@]}"
evaluate coco_box_dense_single eval_coco --model vit_t "${coco[@]}" --single-mask
evaluate coco_box_no_extents eval_coco --model blsam_vit_t "${coco[@]}" --predictor segment_anything
evaluate coco_1_point eval_coco --model blsam_vit_t "${coco[@]}" --prompt point
evaluate coco_1_center eval_coco --model blsam_vit_t "${coco[@]}" --prompt point --point-sampling center
evaluate coco_1_center_single eval_coco --model blsam_vit_t "${coco[@]}" --prompt point --point-sampling center --single-mask
evaluate coco_1_center_dense eval_coco --model vit_t "${coco[@]}" --prompt point --point-sampling center
evaluate coco_1_center_dense_single eval_coco --model vit_t "${coco[@]}" --prompt point --point-sampling center --single-mask
evaluate coco_3_points eval_coco --model blsam_vit_t "${coco[@]}" --prompt point --num-points 3
evaluate coco_3_clicks eval_coco --model blsam_vit_t "${coco[@]}" --prompt point --num-points 3 --protocol sam
evaluate coco_zero_shot eval_zero_shot --model blsam_vit_t --dataset coco --boxes gt "${coco[@]}"
evaluate lvis_box eval_lvis --model blsam_vit_t "${lvis[@]}"
evaluate lvis_1_point eval_lvis --model blsam_vit_t "${lvis[@]}" --prompt point
evaluate lvis_3_points eval_lvis --model blsam_vit_t "${lvis[@]}" --prompt point --num-points 3
evaluate lvis_zero_shot eval_zero_shot --model blsam_vit_t --dataset lvis --boxes gt "${lvis[@]}"
evaluate fine_box eval_coco --model vit_t_fine "${coco[@]}"
evaluate fine_box_single eval_coco --model vit_t_fine "${coco[@]}" --single-mask
evaluate fine_1_center eval_coco --model vit_t_fine "${coco[@]}" --prompt point --point-sampling center
evaluate fine_1_center_single eval_coco --model vit_t_fine "${coco[@]}" --prompt point --point-sampling center --single-mask
evaluate fine_3_clicks eval_coco --model vit_t_fine "${coco[@]}" --prompt point --num-points 3 --protocol sam
evaluate fine_lvis_box eval_lvis --model vit_t_fine "${lvis[@]}"
evaluate fine_everything eval_everything --model vit_t_fine --dataset coco "${coco[@]}" --limit 20
evaluate fine_768_box eval_coco --model vit_t_fine --image-size 768 "${coco[@]}"
evaluate fine_768_1_center eval_coco --model vit_t_fine --image-size 768 "${coco[@]}" --prompt point --point-sampling center
evaluate fine_768_3_clicks eval_coco --model vit_t_fine --image-size 768 "${coco[@]}" --prompt point --num-points 3 --protocol sam
evaluate fine_768_lvis_box eval_lvis --model vit_t_fine --image-size 768 "${lvis[@]}"
evaluate blsam_fine_box eval_coco --model blsam_vit_t_fine "${coco[@]}"
evaluate blsam_fine_box_single eval_coco --model blsam_vit_t_fine "${coco[@]}" --single-mask
evaluate blsam_fine_1_center eval_coco --model blsam_vit_t_fine "${coco[@]}" --prompt point --point-sampling center
evaluate blsam_fine_1_center_single eval_coco --model blsam_vit_t_fine "${coco[@]}" --prompt point --point-sampling center --single-mask
evaluate blsam_fine_3_clicks eval_coco --model blsam_vit_t_fine "${coco[@]}" --prompt point --num-points 3 --protocol sam
evaluate blsam_fine_lvis_box eval_lvis --model blsam_vit_t_fine "${lvis[@]}"
evaluate blsam_fine_everything eval_everything --model blsam_vit_t_fine --dataset coco "${coco[@]}" --limit 20
evaluate blsam_fine_768_box eval_coco --model blsam_vit_t_fine --image-size 768 "${coco[@]}"
evaluate blsam_fine_768_1_center eval_coco --model blsam_vit_t_fine --image-size 768 "${coco[@]}" --prompt point --point-sampling center
evaluate blsam_fine_768_3_clicks eval_coco --model blsam_vit_t_fine --image-size 768 "${coco[@]}" --prompt point --num-points 3 --protocol sam
evaluate blsam_fine_768_lvis_box eval_lvis --model blsam_vit_t_fine --image-size 768 "${lvis[@]}"
exit $failed
