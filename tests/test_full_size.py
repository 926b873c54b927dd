"""SAM's three models at their own size, random weights: minutes and several GB."""

import json

import pytest
import torch
from conftest import gap, randomize, reference_encoder
from PIL import Image
from skimage import data
from training import write_photos

from blsam import sam_model_registry
from blsam.checkpoint import read
from blsam.config import CONFIGS
from blsam.modeling.image_encoder import ImageEncoder
from blsam.training.calibrate import calibrate
from blsam.training.calibration import Settings
from blsam.training.loop import train
from blsam.training.settings import TrainSettings


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [("vit_b", 2), ("vit_l", 1), ("vit_h", 1)])
@torch.no_grad()
def test_exact_equals_segment_anything_at_1024(name, batch):
    reference = randomize(reference_encoder(CONFIGS[name], 1024), 0.02)
    ours, routed = (ImageEncoder(CONFIGS[n]).eval() for n in (name, f"blsam_{name}"))
    ours.load_state_dict(reference.state_dict())
    routed.load_state_dict(reference.state_dict(), strict=False)
    x = torch.randn(batch, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    expected = reference(x)
    del reference
    for what, embedding in (("exact", ours(x)), ("keep 1", routed(x, true_sizes=[(768, 1024)] * batch, keep_ratio=1))):
        difference = gap(embedding, expected)
        print(f"{name} {what}: {difference:.1e} of the standard deviation")
        assert difference <= 1e-4, f"{what}: {difference:.1e}"
    _, routing = routed.encode(x, true_sizes=[(768, 1024)] * batch)
    for stage in routing.stages:
        assert not stage.mask[:, 48:].any() and stage.mask.sum() == batch * 768  # a quarter of 48 x 64


def _random_vit_b(path):
    """A checkpoint in SAM's format."""
    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]()
    randomize(sam.image_encoder, 0.01)
    torch.save(sam.state_dict(), path)
    return path


@pytest.mark.slow
def test_calibration_of_vit_b_at_1024(tmp_path):
    checkpoint = _random_vit_b(tmp_path / "sam_vit_b.pth")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.png")
    output, photos = tmp_path / "blsam_vit_b.safetensors", sorted(tmp_path.glob("*.png"))
    report = calibrate("blsam_vit_b", checkpoint, photos, output, settings=Settings(steps=4, stage_steps=2))
    print(f"\n{len(photos)} photos, {report['seconds']:.0f} s, peak {report['peak_gb']:.1f} GB")
    print("\n".join(report["log"]))
    for row in report["by_keep_ratio"]:
        print(row)
        assert row["cosine_after"] > row["cosine_before"], row
    assert sam_model_registry["blsam_vit_b"](output).image_encoder.img_size == 1024


@pytest.mark.slow
def test_a_training_step_of_blsam_vit_b_at_1024(tmp_path):
    checkpoint = _random_vit_b(tmp_path / "sam_vit_b.pth")
    settings = TrainSettings(
        model="blsam_vit_b",
        data=(write_photos(tmp_path / "photos", 2),),
        output=tmp_path / "run",
        teacher="vit_b",
        teacher_checkpoint=checkpoint,
        holdout=0,
        steps=1,
        batch_size=1,
        log_every=1,
    )
    trained, _ = read(train(settings))
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    print("\n" + ", ".join(f"{k} {v}" for k, v in row.items() if k.startswith("s_") or k in ("sup", "fd", "peak_gb")))
    start, _ = read(checkpoint)
    same = [k for k, v in start.items() if torch.equal(v.half(), trained[k]) and not k.startswith("prompt_encoder")]
    assert len(same) < 20, same  # biases that start at zero may stay there in half precision
