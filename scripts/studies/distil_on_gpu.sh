#!/usr/bin/env bash
# A small SAM from MobileSAM on one GPU, from a bare machine to half-precision weights: encoder at 256, encoder at 512
# (the teacher sees 1024), then masks with prompts. Run it again and it goes on where it was.
#
#     TEACHER=mobile_sam.pt PHOTOS="sa_mini photos" MASKS=sa_mini OUT=runs/gpu scripts/studies/distil_on_gpu.sh
#
# TEACHER: MobileSAM's checkpoint. PHOTOS: folders of photos. MASKS: those of them that have masks, in SA-1B's layout.
# OUT: run folders, and at the end OUT/MODEL.safetensors. MINUTES: of the three runs; SIZES: of their input; START: weights to
# begin with. WHEELS: a folder to install from where nothing else can be reached.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TEACHER:?}" "${PHOTOS:?}" "${MASKS:?}" "${OUT:?}"
model=${MODEL:-vit_t_fine} device=${DEVICE:-cuda} start=${START:-checkpoints/vit_t.safetensors}
read -r at_256 at_512 masks <<<"${MINUTES:-8 8 4}"
read -r small large <<<"${SIZES:-256 512}"
batch=${BATCH:-64} workers=${WORKERS:-12}
for path in "$TEACHER" "$start" $PHOTOS $MASKS; do
  [ -e "$path" ] || { echo "distil_on_gpu: there is no $path" >&2; exit 2; }
done
python -c "import blsam, mobile_sam, timm" 2>/dev/null ||
  pip install --quiet ${WHEELS:+--no-index --find-links "$WHEELS"} -e ".[teachers]"

run() { # name, minutes, options; a run that is over ends at once
  local folder=$OUT/$1 minutes=$2 resume=()
  shift 2
  [ ! -d "$folder/checkpoints" ] || resume=(--resume)
  echo "== $folder: $minutes minutes"
  python scripts/train_sam.py --model "$model" --device "$device" --precision bf16 --workers "$workers" \
    --teacher mobile_sam --teacher-checkpoint "$TEACHER" --distill-loss mse --minutes "$minutes" --output "$folder" \
    --validate-every 1000 --save-every 500 "$@" "${resume[@]}"
  python - "$folder" "$minutes" <<'EOF' # a signal ends a run early
import json, pathlib, sys
facts = json.loads(next(pathlib.Path(sys.argv[1]).glob("checkpoints/step-*/facts.json")).read_text())
sys.exit(facts["minutes"] < float(sys.argv[2]) and f"stopped after {facts['minutes']:.1f} minutes")
EOF
}

run 1_encoder "$at_256" --stage encoder --init "$start" --data $PHOTOS --image-size "$small" \
  --teacher-size $((2 * small)) --batch-size "$batch" --lr 1.5e-3
run 2_encoder "$at_512" --stage encoder --init "$OUT/1_encoder/model.safetensors" --data $PHOTOS --image-size "$large" \
  --teacher-size $((2 * large)) --batch-size $((batch / 4)) --lr 6e-4
run 3_masks "$masks" --init "$OUT/2_encoder/model.safetensors" --data $MASKS --image-size "$large" \
  --teacher-size $((2 * large)) --batch-size $((batch / 4)) --lr 2.5e-4 --distill-weight 0.5 --mask-loss balanced --clicks 2
cp "$OUT/3_masks/model.safetensors" "$OUT/$model.safetensors"
ls -l "$OUT/$model.safetensors"
