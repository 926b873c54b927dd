#!/usr/bin/env bash
# A small SAM from MobileSAM on one GPU, from a bare machine to half-precision weights. Run it again and it goes on.
#
#     TEACHER=mobile_sam.pt START=start.safetensors DATA="sa_mini photos" OUT=runs/gpu scripts/studies/distil_on_gpu.sh
#
# TEACHER: MobileSAM's checkpoint. START: weights of the student. DATA: folders of photos, with a json beside each that is
# annotated. WHEELS: a folder to install from where nothing else can be reached. More options: those of distil_on_gpu.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TEACHER:?}" "${START:?}" "${DATA:?}" "${OUT:?}"
python -c "import blsam, mobile_sam, timm" 2>/dev/null ||
  pip install --quiet ${WHEELS:+--no-index --find-links "$WHEELS"} -e ".[teachers]"
# shellcheck disable=SC2086 # DATA names folders
exec python -m scripts.studies.distil_on_gpu --teacher-checkpoint "$TEACHER" --init "$START" --data $DATA --output "$OUT" "$@"
