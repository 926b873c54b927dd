"""Labelled images: where they are found, how they are prepared, what is drawn."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from blsam.data import archives, imagenet
from blsam.data.imagenet import (
    EvaluationImages,
    LabelledImages,
    TrainingImages,
    checked,
    classifier_input,
    collate,
    open_images,
    training_transform,
)
from tests.helpers import DATA
from tests.labelled import COLOURS, encoded, picture, write_folder, write_tar


def split_tar(path, mode="w"):
    files = {f"{s}/{n}/{i:04}.png": encoded(n, i) for s in ("train", "test") for n in ("red", "blue") for i in (1, 0)}
    return write_tar(path, files | {"train/blue/._0000.png": b"macOS", "train/notes.txt": b"no image"}, mode)


def shards(folder):
    for shard in range(2):
        files = {}
        for i in range(3):
            files[f"{i:03}.png"] = encoded("green", 10 * shard + i)
            files[f"{i:03}.cls"] = str(2 * shard).encode()
        write_tar(folder / f"set-train-{shard:06}.tar", files)
    write_tar(folder / "set-val-000000.tar", {"a.png": encoded("red", 0), "a.cls": b"1\n"})
    return folder


def test_folders_tars_and_packed_tars_hold_the_same(tmp_path):
    folder = write_folder(tmp_path / "set", {"train": 2, "test": 2})
    tars = split_tar(tmp_path / "a.tar"), split_tar(tmp_path / "b.tar.xz", "w:xz")
    read = [open_images(path, "train") for path in (folder, folder / "train", *tars)]
    for images in read:
        assert list(images.ids) == ["blue/0000.png", "blue/0001.png", "red/0000.png", "red/0001.png"]
        assert images.classes == ("blue", "red") and list(images.labels) == [0, 0, 1, 1]
        assert np.array_equal(np.array(images.read(2)), np.array(picture("red", 0)))
    assert isinstance(read[1].sources[0], Path) and [type(one.sources[0]) for one in read[2:]] == [tuple, bytes]


def test_splits_are_told_apart(tmp_path):
    folder = write_folder(tmp_path / "set", {"train": 2, "val": 1})
    held_out = open_images(folder, "val", marked=True)
    assert len(held_out) == 2 and np.array_equal(np.array(held_out.read(0)), np.array(picture("blue", 1000)))
    assert len(open_images(split_tar(tmp_path / "all.tar"), "val", marked=True)) == 4
    for unmarked in (folder / "train", write_tar(tmp_path / "plain.tar", {"red/1.png": encoded("red", 1)})):
        assert len(open_images(unmarked, "val"))  # named for it, so taken
        with pytest.raises(ValueError, match="no val images in .*named val or validation or valid or test"):
            open_images(unmarked, "val", marked=True)


def test_shards_of_webdataset(tmp_path):
    images = open_images(shards(tmp_path), "train")
    assert images.classes == ("0", "1", "2") and list(images.labels) == [0, 0, 0, 2, 2, 2]
    assert np.array_equal(np.array(images.read(4)), np.array(picture("green", 11)))
    held_out = open_images(tmp_path, "val", marked=True, classes=images.classes)
    assert list(held_out.labels) == [1] and held_out.ids[0] == "set-val-000000.tar/a.png"
    files = [tmp_path / f"set-train-00000{i}.tar" for i in range(2)]
    assert open_images(files, "train").ids == images.ids


def test_webdataset_reads_the_same(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    images = open_images(shards(tmp_path), "train")
    urls = [str(tmp_path / f"set-train-00000{i}.tar") for i in range(2)]
    theirs = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls")
    for i, (image, label) in enumerate(theirs):
        assert label == images.labels[i] and np.array_equal(np.array(image), np.array(images.read(i)))
    assert i == 5


def test_classes_of_training_hold_for_validation(tmp_path):
    folder = write_folder(tmp_path / "set", {"train": 1}, ("red",))
    assert list(open_images(folder, "train", classes=("blue", "green", "red")).labels) == [2]
    with pytest.raises(ValueError, match="has a class red, which is none of the 2 known ones"):
        open_images(folder, "train", classes=("blue", "green"))


@pytest.mark.parametrize(
    "files, error",
    [
        ({"1.png": b"", "1.cls": b"cat"}, "1.cls holds no class number but b'cat'"),
        ({"1.png": b"", "2.png": b"", "1.cls": b"1"}, "2.png has no .cls beside it"),
        ({"1.png": b""}, "no train images in"),
    ],
)
def test_tars_that_are_no_data_set(tmp_path, files, error):
    with pytest.raises(ValueError, match=error):
        open_images(write_tar(tmp_path / "set.tar", files), "train")


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images at"):
        open_images(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="no train images in"):
        open_images(tmp_path, "train")
    whole = split_tar(tmp_path / "whole.tar.xz", "w:xz").read_bytes()
    for content in (whole[: len(whole) // 2], b"text"):
        (tmp_path / "half.tar.xz").write_bytes(content)
        with pytest.raises(ValueError, match="half.tar.xz is no tar, or a damaged one"):
            open_images(tmp_path / "half.tar.xz", "train")
    mixed = {"red/1.png": encoded("red", 1)}, {"1.png": encoded("red", 1), "1.cls": b"1"}
    with pytest.raises(ValueError, match="classes by name, such as red, and by number"):
        open_images([write_tar(tmp_path / f"{i}.tar", files) for i, files in enumerate(mixed)], "train")


def test_much_in_memory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MUCH", 1000)
    with pytest.warns(UserWarning, match="over 4 GB") as said:
        open_images(split_tar(tmp_path / "b.tar.xz", "w:xz"), "train")
    assert len(said) == 1


@pytest.mark.parametrize("shape", [(60, 90), (91, 50), (64, 64), (20, 33)])
@pytest.mark.parametrize("size, ratio", [(32, 0.875), (48, 1.0), (32, None), (48, 0.9), (56, None)])
def test_evaluation_equals_timms(shape, size, ratio):
    photo = picture("green", 3, shape)
    theirs = create_transform(size, interpolation="bicubic", crop_pct=ratio or (1.0 if size <= 32 else 0.875))
    ours = classifier_input(np.array(photo), size, ratio)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs(photo))


@pytest.mark.parametrize("augment, size", [("deit", 48), ("deit", 32), ("light", 32), ("none", 32)])
def test_samples_depend_on_seed_and_number_alone(tmp_path, augment, size):
    images = open_images(write_folder(tmp_path, {"train": 4}, size=40), "train")
    transform = training_transform(augment, size, erasing=0.5)
    first = TrainingImages(images, transform, seed=1)
    whole = [first[n] for n in range(24)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    again = TrainingImages(images, transform, seed=1)
    for n in (13, 2, 23):
        assert torch.equal(again[n][0], whole[n][0]) and again[n][1] == whole[n][1]
    assert whole[0][0].shape == (3, size, size)
    if augment != "none":
        other = TrainingImages(images, transform, seed=2)
        assert not all(torch.equal(other[n][0], whole[n][0]) for n in range(8))
    for epoch in range(3):  # every image once
        assert sum(label for _, label in whole[8 * epoch : 8 * epoch + 8]) == 4
    means = [torch.stack([image for image, _ in whole[8 * e : 8 * e + 8]]).mean().item() for e in range(2)]
    assert (abs(means[0] - means[1]) < 1e-6) == (augment == "none")  # drawn anew


def test_light_is_a_crop_of_the_padded_image_or_its_mirror():
    image = picture("red", 0, 16)
    whole = np.pad(np.array(image), ((2, 2), (2, 2), (0, 0)))
    crops = [whole[y : y + 16, x : x + 16][:, ::s] for y in range(5) for x in range(5) for s in (1, -1)]
    wanted = [classifier_input(np.ascontiguousarray(crop), 16) for crop in crops]
    transform = training_transform("light", 16)
    found = set()
    for seed in range(40):
        imagenet.seed_all(seed)
        made = transform(image)
        (hit,) = [i for i, one in enumerate(wanted) if torch.allclose(made, one)]
        found.add(hit)
    assert len(found) > 10


def test_deit_augments_small_images_without_resizing():
    resize, crop = training_transform("deit", 32).transforms[0].transforms  # the short side to 32, as in evaluation
    assert (type(resize).__name__, resize.size) == ("Resize", 32) and crop.padding == 4
    for size in ((20, 20), (500, 400)):
        assert training_transform("deit", 32)(picture("red", 0, size)).shape == (3, 32, 32)
    names = [type(step).__name__ for step in training_transform("deit", 224, erasing=0.25).transforms]
    assert names == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor"] + [
        "Normalize",
        "RandomErasing",
    ]


def test_a_damaged_image_is_one_line():
    good = encoded("red", 0)
    images = LabelledImages(("red",), [0, 0], ["red/1.png", "red/2.png"], [good, good[:300]])
    items = [EvaluationImages(images, imagenet.EvaluationTransform(16))[i] for i in range(2)]
    with pytest.raises(ValueError, match="red/2.png is not an image that can be read") as caught:
        checked(collate(items))
    assert "\n" not in str(caught.value)
    batch, labels = checked(collate(items[:1]))
    assert batch.shape == (1, 3, 16, 16) and labels.tolist() == [0]


def test_what_cannot_be_prepared_is_one_line():
    images = LabelledImages(("red",), [0], ["red/1.png"], [encoded("red", 0)])

    def fails(image):
        raise RuntimeError("too small")

    item = EvaluationImages(images, fails)[0]
    assert item == "red/1.png, 16 x 16, cannot be prepared (too small)"


def test_tars_named_one_by_one_keep_to_their_split(tmp_path):
    paths = sorted(shards(tmp_path).glob("*.tar"))
    assert len(open_images(paths, "train")) == 6 and list(open_images(paths, "val").labels) == [1]


def test_a_class_may_be_called_train(tmp_path):
    """As one of CIFAR-100 is: with splits around the classes, and without, as folders and in tars."""
    names = ("apple", "train", "wolf")
    files = {f"{split}/{name}/0.png": encoded("red", 0) for split in ("train", "test") for name in names}
    tar = write_tar(tmp_path / "set.tar", files)
    for name in files:
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(files[name])
    for path in (tmp_path / "set", tar):
        for split in ("train", "val"):
            assert open_images(path, split, marked=True).classes == names and len(open_images(path, split)) == 3
    assert open_images(tmp_path / "set" / "train", "train").classes == names


def test_images_may_lie_deeper_than_their_class(tmp_path):
    """Tiny ImageNet's layout: the class is the folder right below the split."""
    files = {f"tiny/train/{name}/images/{i}.png": encoded("red", i) for name in ("n1", "n2") for i in (0, 1)}
    tar = write_tar(tmp_path / "tiny.tar", files)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(files[name])
    for path in (tmp_path / "tiny", tar):
        images = open_images(path, "train")
        assert images.classes == ("n1", "n2") and images.ids[0] == "n1/images/0.png"


def test_without_timm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'blsam\[classify\]'"):
        training_transform("deit", 32)
    assert training_transform("light", 32)(Image.new("RGB", (40, 40))).shape == (3, 32, 32)


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="no CIFAR-10 (BLSAM_DATA)")
def test_cifar_10_as_it_lies():
    images = open_images(DATA / "cifar10", "val", marked=True)
    assert len(images) == 5000 and len(images.classes) == 10 and images.read(0).size == (32, 32)
    assert np.bincount(images.labels).tolist() == [500] * 10 and set(COLOURS).isdisjoint(images.classes)
