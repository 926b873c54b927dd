"""Teachers: our dense models, and MobileSAM's encoder at sizes that its own package does not take."""

import sys

import pytest
import torch

from blsam.build_sam import sam_model_registry
from blsam.checkpoint import CheckpointError
from blsam.config import CONFIGS
from blsam.options import shipped_checkpoint
from blsam.training.loop import take_decoder
from blsam.training.teachers import check_grid, finer_by, load_teacher


@torch.no_grad()
def test_a_dense_model_and_what_reads_its_embedding():
    encoder, decoder = load_teacher("vit_t", shipped_checkpoint("vit_t"), 128)
    assert encoder(torch.zeros(1, 3, 128, 128)).shape == (1, 256, 8, 8)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert {key.split(".")[0] for key in decoder} == {"prompt_encoder", "mask_decoder", "image_encoder"}


@torch.no_grad()
def test_mobile_sam_equals_its_own_package(tmp_path):
    pytest.importorskip("mobile_sam")
    from mobile_sam import sam_model_registry

    torch.manual_seed(0)
    sam = sam_model_registry["vit_t"]().eval()
    torch.save(sam.state_dict(), tmp_path / "mobile_sam.pt")
    encoder, decoder = load_teacher("mobile_sam", tmp_path / "mobile_sam.pt", 1024)
    x = torch.randn(1, 3, 1024, 1024)
    assert torch.equal(encoder(x), sam.image_encoder(x))
    small, _ = load_teacher("mobile_sam", tmp_path / "mobile_sam.pt", 256)
    assert small(x[..., :256, :256]).shape == (1, 256, 16, 16)
    assert "image_encoder.neck.3.weight" in decoder and "mask_decoder.iou_token.weight" in decoder


def test_other_checkpoints_and_a_missing_package_are_named(monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "mobile_sam.modeling.tiny_vit_sam", None)
        with pytest.raises(ImportError, match="pip install mobilesam-mirror"):
            load_teacher("mobile_sam", shipped_checkpoint("vit_t"), 128)
    pytest.importorskip("mobile_sam")
    with pytest.raises(CheckpointError, match="not a MobileSAM checkpoint"):
        load_teacher("mobile_sam", shipped_checkpoint("vit_t"), 128)


def test_the_frame_of_a_teacher():
    assert (finer_by(None, 512), finer_by(512, 512), finer_by(1536, 512)) == (1, 1, 3)
    with pytest.raises(ValueError, match="--teacher-size 1536 is not a multiple of --image-size 1024"):
        finer_by(1536, 1024)


def test_a_teacher_answers_on_a_grid_as_fine():
    fine = CONFIGS["vit_t_fine"]
    for student, teacher, finer in ((fine, "vit_t", 2), (fine, "vit_t_fine", 1), (fine, "mobile_sam", 4)):
        check_grid(student, teacher, finer)
    check_grid(CONFIGS["vit_t"], "vit_t_fine", 1)
    for finer in (1, 3):
        with pytest.raises(ValueError, match="vit_t_fine answers in 2 cells .* --teacher-size must be 2 times"):
            check_grid(fine, "vit_t", finer)


def test_a_student_that_goes_on_keeps_its_own_norm():
    """The teacher's last norm is a start; a student that has the teacher's decoder already has trained its own."""
    _, decoder = load_teacher("vit_t", shipped_checkpoint("vit_t"), 128)
    key = "image_encoder.neck.3.weight"

    def student():
        sam = sam_model_registry["vit_t"](image_size=128)
        with torch.no_grad():
            sam.state_dict()[key].fill_(3.0)
        return sam

    fresh = student()
    take_decoder(fresh, decoder)
    assert torch.equal(fresh.state_dict()[key], decoder[key])
    further = student()
    further.load_state_dict({k: v.half() for k, v in decoder.items() if k != key}, strict=False)
    take_decoder(further, decoder)
    assert (further.state_dict()[key] == 3.0).all()
    assert torch.equal(further.state_dict()["mask_decoder.iou_token.weight"], decoder["mask_decoder.iou_token.weight"])
