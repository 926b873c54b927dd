"""Figures of classifiers against figures by hand and timm's own."""

import time

import numpy as np
import pytest
import timm
import torch
from torch import nn

from blsam.build_classifier import build_classifier
from blsam.checkpoint import save
from blsam.config import CLASSIFIERS
from blsam.data.imagenet import classifier_input, open_images
from blsam.distributed import CPU, World
from blsam.evaluation.classifiers import Measured, labelled, load_classifier
from blsam.evaluation.imagenet import Correct, accuracy, count_correct, counted_macs, images_a_second, some_images
from blsam.modeling.classifier import BLVisionTransformer, Classified
from blsam.options import UsageError
from tests.labelled import write_folder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_first_and_first_five_by_hand():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    found = count_correct(lambda x: logits[: len(x)], [(torch.zeros(3, 1), torch.tensor([0, 1, 5]))] * 2, CPU)
    assert found == Correct(2, 4, 6) and round(found.top1, 2) == 33.33 and round(found.top5, 2) == 66.67
    few = count_correct(lambda x: logits[: len(x), :2], [(torch.zeros(3, 1), torch.tensor([0, 0, 0]))], CPU)
    assert few == Correct(2, 3, 3)
    assert Correct.together([found, few]) == Correct(4, 7, 9)


def test_multiply_adds_are_those_of_the_papers():
    """12 n C^2 + 2 n^2 C a block of DeiT-T, patch embedding and head; the count of a plain ViT of ours is timm's."""
    dim, n = 192, 197
    wanted = 12 * (12 * n * dim**2 + 2 * n**2 * dim) + 196 * 768 * dim + 1000 * dim
    images = torch.zeros(1, 3, 224, 224, device="meta")
    for name in ("vit_tiny_patch16_224", "timm:deit_tiny_patch16_224"):  # on the meta device: a pass costs nothing
        assert counted_macs(load_classifier(name, None, device=CPU).model.to("meta"), images) == wanted


class Half(nn.Module):
    """Of which an image decides how much is computed: as many multiply-adds as its first pixel says."""

    by_image = True

    def classify(self, x):
        return Classified(torch.eye(2)[x[:, 0].long() % 2], x, macs=x[:, 0].long())


def test_multiply_adds_are_a_mean_over_all_images():
    batches = [
        (torch.tensor([[2e9], [3e9], [4e9]]), torch.tensor([0, 0, 0])),
        (torch.tensor([[7e9]]), torch.tensor([0])),
    ]
    found = count_correct(Half(), batches, CPU)
    assert found == Correct(4, 4, 4, int(16e9)) and found.gmacs == 4
    assert Correct.together([found, found]) == Correct(8, 8, 8, int(32e9))


class Depends(nn.Module):
    """As many products of 2 x 2 as an image's first pixel says."""

    def forward(self, x):
        for _ in range(int(x[0, 0, 0, 0])):
            torch.ones(2, 2) @ torch.ones(2, 2)


def test_multiply_adds_of_images_that_differ_are_averaged():
    assert counted_macs(Depends(), torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)) == 8 * 2.5


def test_images_a_second_are_of_the_median_pass(monkeypatch):
    clock = iter(np.cumsum([0, 1, 5, 9, 5, 2, 5, 3, 0, 0]))  # passes of 1, 9, 2 and 3 seconds, 5 between them
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert images_a_second(nn.Identity(), torch.zeros(6, 1), seconds=12.5) == 2  # of 1, 2, 3 and 9 the upper middle


def test_processes_share_the_images(tmp_path):
    images = open_images(write_folder(tmp_path, {"val": 5}), "val")

    class Reddish(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 2].mean((1, 2)), x[:, 0].mean((1, 2))], 1)

    measured = Measured("reddish", Reddish(), 16, 2, 1.0, lambda image: classifier_input(np.array(image), 16), "")
    assert accuracy(measured, images, 3, 0, CPU, World()) == Correct(10, 10, 10)

    class Half(World):
        def gather(self, value):
            return [value]

    assert accuracy(measured, images, 3, 0, CPU, Half(1, 2)).images == 5
    assert some_images(measured, images, 4).shape == (4, 3, 16, 16)
    assert some_images(measured, None, 2).shape == (2, 3, 16, 16)


def test_timms_models_keep_their_own_statistics(tmp_path):
    theirs = timm.create_model("mobilevit_xxs")
    path = tmp_path / "m.pth"
    torch.save({"state_dict": theirs.state_dict()}, path)
    measured = load_classifier("timm:mobilevit_xxs", path, crop_ratio=0.9, device=CPU)
    assert (measured.size, measured.classes, measured.crop_ratio) == (256, 1000, 0.9)
    assert measured.transform.transforms[-1].mean.tolist() == [0, 0, 0]
    assert "to 284, centre 256 (crop ratio 0.9)" in measured.preparation
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(measured.model(x), theirs.eval()(x))


def test_ours_keeps_its_image_size_and_ratio():
    measured = load_classifier("blvit_mini_patch4_32", None, image_size=64, keep_ratio=0.5, device=CPU)
    assert measured.size == 64 and measured.crop_ratio == 0.875 and measured.model.keep_ratio == 0.5
    more, fewer = (
        counted_macs(build_classifier(CLASSIFIERS["blvit_mini_patch4_32"], keep_ratio=r), torch.zeros(1, 3, 32, 32))
        for r in (0.5, 0.25)
    )
    assert fewer < 0.85 * more


def test_a_file_of_the_trainer_says_how_it_was_validated(tmp_path):
    """Its image size and its crop are taken; options go first."""
    config = CLASSIFIERS["vit_mini_patch4_32"]
    state, path = BLVisionTransformer(config, img_size=48, num_classes=2).state_dict(), tmp_path / "a.safetensors"
    save(path, state, {"model": config.name, "classes": ["blue", "red"], "crop_ratio": "0.5"})
    found = load_classifier(config.name, path, device=CPU)
    assert (found.size, found.crop_ratio, found.names) == (48, 0.5, ("blue", "red"))
    asked = load_classifier(config.name, path, image_size=32, crop_ratio=0.9, device=CPU)
    assert (asked.size, asked.crop_ratio) == (32, 0.9)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm:resnet18", {"keep_ratio": 0.5}, "leave --keep-ratio and --dtype out"),
        ("vit_mini_patch4_32", {"keep_ratio": 0.5}, "is a plain model"),
        ("timm:vit_tiny_patch16_224", {"image_size": 8}, "cannot be made with --image-size 8"),
    ],
)
def test_options_that_would_do_nothing_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words) as error:
        load_classifier(name, None, device=CPU, **options)
    assert "\n" not in str(error.value)


def test_images_of_other_classes_are_refused(tmp_path):
    folder = write_folder(tmp_path / "set", {"val": 1})
    with pytest.raises(UsageError, match="the images are of 2 classes, vit_mini_patch4_32 answers 10"):
        labelled(load_classifier("vit_mini_patch4_32", None, device=CPU), [folder])
