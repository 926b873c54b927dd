"""A SAM checkpoint and a folder of photos in, a checkpoint of a `blsam_*` model out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import checkpoint as ckpt
from ..build_sam import build_sam
from ..config import EncoderConfig
from ..data.annotations import Annotations
from ..distributed import peak_gb
from ..evaluation.prompted import object_ious
from ..files import sha256
from ..images import photos_in, read_image
from ..modeling.sam import Sam
from ..predictor import SamPredictor
from .calibration import Calibration, Settings


def default_limit(config: EncoderConfig) -> int:
    """Photos used when nobody says how many."""
    return 64 if config.dim < 384 else 16


def choose_photos(folder: Path, limit: int, seed: int) -> list[Path]:
    """A seeded choice of the folder's photos, in the order of their names; FileNotFoundError or ValueError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    photos = photos_in(folder)
    if len(photos) < 2 or limit < 2:
        raise ValueError(f"calibration needs at least 2 photos; {folder} has {len(photos)}, the limit is {limit}")
    order = np.random.default_rng(seed).permutation(len(photos))[:limit]
    return [photos[i] for i in sorted(order)]


def calibrate(
    config: EncoderConfig,
    checkpoint: str | Path,
    photos: Sequence[Path],
    output: str | Path,
    *,
    image_size: int | None = None,
    settings: Settings | None = None,
    annotations: Annotations | None = None,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> dict[str, Any]:
    """Fit a big.LITTLE model to a SAM checkpoint on unlabelled photos, write it to `output`, return the report.

    The report: `by_keep_ratio`, a list of keep_ratio, cosine_before and cosine_after (held-out photos, to the dense
    embedding; before: zero E-branches and a fresh seeded predictor) and, with annotations, box_miou_before, _after,
    _dense in percent; seconds (of the fitting; not of what is measured before and after it), photos, peak memory in GB,
    what each branch explains, whether the correction was kept, the log.

    A run of the same settings that was killed goes on from `output`.calibration/.
    """
    settings = settings or Settings()
    output = Path(output)
    state, _ = ckpt.read(checkpoint, config)
    if any(ckpt.ADDED["routing"].match(key) for key in state):
        raise ckpt.CheckpointError(f"{checkpoint} is a big.LITTLE model already; calibration starts from a dense one")
    torch.manual_seed(settings.seed)
    sam = build_sam(config, checkpoint, image_size=image_size, keep_ratio=settings.keep_ratio, device=device)

    def inputs(i: int) -> tuple[torch.Tensor, tuple[int, int]]:
        return prepare(sam, photos[i])

    folder = output.with_name(output.name + ".calibration")
    files = [(str(p), p.stat().st_size) for p in photos]
    identity = json.dumps([sha256(checkpoint), config.identity, sam.image_encoder.img_size, files])
    with tqdm(total=100, unit="%", disable=quiet or not sys.stderr.isatty()) as bar:
        log: list[str] = []

        def progress(text: str, done: float) -> None:
            log.append(text)
            bar.n = round(100 * done)
            bar.set_postfix_str(text)

        def note(text: str) -> None:
            log.append(text)
            if not quiet:
                tqdm.write(text, file=sys.stderr)

        run = Calibration(sam.image_encoder, inputs, len(photos), settings, folder, identity, progress, note)
        rows = [{"keep_ratio": k, "cosine_before": c} for k, c in zip(run.ratios, run.cosines(run.ratios))]
        if annotations is not None:
            for row in rows:
                row["box_miou_before"] = box_miou(sam, annotations, row["keep_ratio"])
        found = run.run()
    for row, cosine in zip(rows, run.cosines(run.ratios)):
        row["cosine_after"] = cosine
        if annotations is not None:
            row["box_miou_after"] = box_miou(sam, annotations, row["keep_ratio"])
            row["box_miou_dense"] = rows[0].get("box_miou_dense") or box_miou(sam, annotations, 1.0)
    report = {"by_keep_ratio": rows, **found, "log": log, "photos": len(photos), "peak_gb": peak_gb(sam.device)}
    metadata = {"model": config.name, "image_size": sam.image_encoder.img_size, "calibration": report}
    ckpt.save(output, sam.state_dict(), metadata)
    shutil.rmtree(folder)
    return report


def prepare(sam: Sam, photo: Path) -> tuple[torch.Tensor, tuple[int, int]]:
    """A photo as the image encoder takes it, [3, S, S] on the model's device, and its true size (h, w) in there."""
    image = SamPredictor(sam).transform.apply_image(read_image(photo))
    return sam.preprocess(torch.as_tensor(image, device=sam.device).permute(2, 0, 1)), image.shape[:2]


def box_miou(sam: Sam, annotations: Annotations, keep_ratio: float) -> float:
    """Mean IoU in percent of box prompts, protocol `paper`."""
    return float(object_ious(sam, annotations, keep_ratio)[0]["box"].mean())


def table(report: dict[str, Any]) -> str:
    """The report by keep ratio, for people."""
    lines = [
        "keep   cosine before   after"
        + ("   box mIoU before   after   dense" if "box_miou_after" in report["by_keep_ratio"][0] else "")
    ]
    for row in report["by_keep_ratio"]:
        line = f"{row['keep_ratio']:<5g}{row['cosine_before']:>15.4f}{row['cosine_after']:>8.4f}"
        if "box_miou_after" in row:
            line += f"{row['box_miou_before']:>18.2f}{row['box_miou_after']:>8.2f}{row['box_miou_dense']:>8.2f}"
        lines.append(line)
    return "\n".join(lines)
