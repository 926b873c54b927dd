"""A dense checkpoint and a folder of photos in, a checkpoint of a big.LITTLE model out: of SAM's, or a plain ViT's."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .. import checkpoint as ckpt
from ..build_classifier import build_classifier, read_classifier
from ..build_sam import build_sam
from ..checkpoint import checked_path
from ..checkpoint_files import read_content
from ..config import ClassifierConfig, EncoderConfig, LayersConfig
from ..data.annotations import Annotations
from ..data.imagenet import classifier_input
from ..distributed import peak_gb
from ..evaluation.prompted import object_ious
from ..files import sha256
from ..images import photos_in, read_image
from ..modeling.classifier import ADDED, BLVisionTransformer
from ..modeling.sam import Sam
from ..modeling.staged import Staged
from ..predictor import SamPredictor
from .calibration import Calibration, Settings

TOKENS = 2**16  # of all photos together


def default_limit(config: LayersConfig) -> int:
    """Photos used when nobody says how many: such as hold 65,000 tokens or so at the preset's image size."""
    if isinstance(config, ClassifierConfig):
        return TOKENS // (config.image_size // config.patch) ** 2
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
    config: EncoderConfig | ClassifierConfig,
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
    """Fit a big.LITTLE model to a dense checkpoint on unlabelled photos, write it to `output`, return the report.

    The report: `by_keep_ratio`, a list of keep_ratio, cosine_before and cosine_after (held-out photos, to the dense
    embedding, of classifiers to the normalised tokens; before: zero E-branches and a fresh seeded predictor) and, with
    annotations, box_miou_before, _after, _dense in percent (segmenters alone); seconds (of the fitting; not of what is
    measured before and after it), photos, peak memory in GB, what each branch explains, whether the correction was kept,
    the log.

    A run of the same settings that was killed goes on from `output`.calibration/.
    """
    settings = settings or Settings()
    output = Path(output)
    torch.manual_seed(settings.seed)
    # what a classifier's file says of its images holds for what is made of it
    said = read_content(checked_path(checkpoint))[1] if isinstance(config, ClassifierConfig) else {}
    whole, model, inputs = _build(config, checkpoint, photos, image_size, settings.keep_ratio, device, said)
    if annotations is not None and not isinstance(whole, Sam):
        raise ValueError("annotations of masks are for segmenters; a classifier is calibrated without")

    folder = output.with_name(output.name + ".calibration")
    files = [(str(p), p.stat().st_size) for p in photos]
    identity = json.dumps([sha256(checkpoint), config.identity, model.img_size, files])
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

        bar.set_postfix_str("held-out photos, before")
        run = Calibration(model, inputs, len(photos), settings, folder, identity, progress, note)
        rows = [{"keep_ratio": k, "cosine_before": c} for k, c in zip(run.ratios, run.cosines(run.ratios))]
        if annotations is not None and isinstance(whole, Sam):
            for row in rows:
                row["box_miou_before"] = box_miou(whole, annotations, row["keep_ratio"])
        found = run.run()
    for row, cosine in zip(rows, run.cosines(run.ratios)):
        row["cosine_after"] = cosine
        if annotations is not None and isinstance(whole, Sam):
            row["box_miou_after"] = box_miou(whole, annotations, row["keep_ratio"])
            row["box_miou_dense"] = rows[0].get("box_miou_dense") or box_miou(whole, annotations, 1.0)
    report = {"by_keep_ratio": rows, **found, "log": log, "photos": len(photos), "peak_gb": peak_gb(run.device)}
    metadata: dict[str, Any] = {"model": config.name, "image_size": model.img_size, "calibration": report}
    if isinstance(whole, BLVisionTransformer):
        metadata |= {"image_size": whole.img_size[0]} | {k: said[k] for k in ("classes", "crop_ratio") if k in said}
    ckpt.save(output, whole.state_dict(), metadata)
    shutil.rmtree(folder)
    return report


Inputs = Callable[[int], tuple[torch.Tensor, tuple[int, int]]]


def _build(
    config: EncoderConfig | ClassifierConfig,
    checkpoint: str | Path,
    photos: Sequence[Path],
    image_size: int | None,
    keep_ratio: float,
    device: torch.device | str,
    said: dict[str, str],
) -> tuple[nn.Module, Staged, Inputs]:
    """The whole model on a dense checkpoint, the part that is fitted, and photo number i as that takes it."""
    if isinstance(config, ClassifierConfig):
        if any(map(ADDED.match, read_classifier(checkpoint))):
            raise ckpt.CheckpointError(
                f"{checkpoint} is a big.LITTLE model already; calibration starts from a dense one"
            )
        model = build_classifier(config, checkpoint, image_size=image_size, keep_ratio=keep_ratio, device=device)
        size, crop = model.img_size, float(said["crop_ratio"]) if "crop_ratio" in said else None
        return model, model, lambda i: (classifier_input(read_image(photos[i]), size[0], crop).to(device), size)
    state, _ = ckpt.read(checkpoint, config)
    if any(ckpt.ADDED["routing"].match(key) for key in state):
        raise ckpt.CheckpointError(f"{checkpoint} is a big.LITTLE model already; calibration starts from a dense one")
    sam = build_sam(config, checkpoint, image_size=image_size, keep_ratio=keep_ratio, device=device)
    return sam, sam.image_encoder, lambda i: prepare(sam, photos[i])


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
