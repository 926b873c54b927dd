"""SAM's three models at their own size, random weights: minutes and several GB."""

import pytest
import torch
from conftest import gap, randomize, reference_encoder
from PIL import Image
from skimage import data

from blsam import sam_model_registry
from blsam.config import CONFIGS
from blsam.modeling.image_encoder import ImageEncoder
from blsam.training.calibrate import calibrate
from blsam.training.calibration import Settings


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


@pytest.mark.slow
def test_calibration_of_vit_b_at_1024(tmp_path):
    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]()
    randomize(sam.image_encoder, 0.01)
    torch.save(sam.state_dict(), tmp_path / "sam_vit_b.pth")
    del sam
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.png")
    output, photos = tmp_path / "blsam_vit_b.safetensors", sorted(tmp_path.glob("*.png"))
    report = calibrate(
        "blsam_vit_b", tmp_path / "sam_vit_b.pth", photos, output, settings=Settings(steps=4, stage_steps=2)
    )
    print(f"\n{len(photos)} photos, {report['seconds']:.0f} s, peak {report['peak_gb']:.1f} GB")
    print("\n".join(report["log"]))
    for row in report["by_keep_ratio"]:
        print(row)
        assert row["cosine_after"] > row["cosine_before"], row
    assert sam_model_registry["blsam_vit_b"](output).image_encoder.img_size == 1024
