"""Labelled images to train and evaluate classifiers on, and how they are prepared: ImageNet, CIFAR-10, your own.

They lie in folders or in tars; each image is found by its number, so that any run, of any number of processes, can go
on where it was. Reading and `classifier_input` need what the package needs, augmentation needs timm.
"""

from __future__ import annotations

import importlib.util
import io
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import transforms

from ..files import printable
from ..images import SUFFIXES
from ..options import one_line
from .archives import TARS, Source, content, members

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of red, green and blue in 0 ... 1
CROP = 0.875  # DeiT, EViT, Evo-ViT: 224 of 256
NATIVE = 32  # images of so many pixels, or fewer, are taken as they are: DeiT does so for CIFAR
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
AUGMENT = ("deit", "light", "none")
ALL_SPLITS = {name for names in SPLITS.values() for name in names}
Found = tuple[str | int, str, Source]  # class by name or number, id, source
Transform = Callable[[Image.Image], torch.Tensor]
Item = tuple[torch.Tensor, int] | str


@dataclass(frozen=True)
class LabelledImages:
    """Images by number, in an order that depends on their names alone.

    classes: names by label; labels, ids (`class/NAME.jpg`, or a shard's `TAR/KEY`) and sources: of each image.
    """

    classes: tuple[str, ...]
    labels: Sequence[int]
    ids: Sequence[str]
    sources: Sequence[Source]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Image.Image:
        """Image i as RGB, read as all of ImageNet's numbers are: no upright turn, no colour profile. ValueError in one
        line if it is damaged."""
        try:
            with Image.open(io.BytesIO(content(self.sources[i]))) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{printable(self.ids[i])} is not an image that can be read ({error})") from None


# --- finding them ----------------------------------------------------------------------------------------------------


def open_images(
    paths: Path | Sequence[Path], split: str, *, marked: bool = False, classes: Sequence[str] | None = None
) -> LabelledImages:
    """The images of a split, "train" or "val", below folders or in tars.

    A folder `ROOT/class/NAME.jpg`, or `ROOT/train/class/NAME.jpg` with `ROOT/val` (validation, test) beside it; a tar of
    either; webdataset shards of `KEY.jpg` + `KEY.cls` (an integer); or a folder of tars, with the split in their names
    where there are several. Packed tars are read into memory once, plain ones are read where they lie.

    Args:
        marked: only images that a folder or name says to be of this split; otherwise all where nothing says so.
        classes: names by label; None: the names found, sorted (of shards, the integers up to the largest).

    Raises FileNotFoundError, or ValueError in one line: no images, unknown classes, a damaged tar.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    named = sorted((one for path in paths for one in _found(path, split, marked)), key=lambda one: one[1])
    where = ", ".join(map(str, paths))
    if not named:
        beside = f" in a folder or tar named {' or '.join(SPLITS[split])}" if marked else ""
        raise ValueError(f"no {split} images in {where}: looked for CLASS/NAME.jpg and for KEY.jpg + KEY.cls{beside}")
    found = {label for label, _, _ in named}
    names = sorted(label for label in found if isinstance(label, str))
    numbers = [label for label in found if isinstance(label, int)]
    if names and numbers:
        raise ValueError(f"{where} has classes by name, such as {printable(names[0])}, and by number; give one kind")
    if classes is None:
        classes = names or [str(i) for i in range(1 + max(numbers))]
    place = {name: i for i, name in enumerate(classes)}
    unknown = sorted(name for name in map(str, found) if name not in place)
    if unknown:
        raise ValueError(f"{where} has a class {printable(unknown[0])}, which is none of the {len(place)} known ones")
    labels, ids, sources = zip(*named)
    return LabelledImages(tuple(classes), [place[str(label)] for label in labels], ids, sources)


def _found(path: Path, split: str, marked: bool) -> list[Found]:
    """The images of a split at one path."""
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}")
    if not path.is_dir():
        other = not _says(path.name, split) and any(_says(path.name, one) for one in SPLITS)
        return [] if other else _in_tar(path, split, marked)
    inside = sorted(one for one in path.iterdir() if not one.name.startswith("."))
    folders = [one for one in inside if one.is_dir()]
    splits = [one for one in folders if one.name in ALL_SPLITS and any(deeper.is_dir() for deeper in one.iterdir())]
    if splits:  # a class of that name holds images, no folders
        mine = [one for one in splits if one.name in SPLITS[split]]
        return _in_classes(mine[0]) if mine else []
    tars = [one for one in inside if one.name.endswith(TARS)]
    if tars:
        return [one for tar in tars for one in _found(tar, split, marked)]
    return [] if marked else _in_classes(path)


def _in_classes(root: Path) -> list[Found]:
    """The images of a folder that holds one of each class."""
    folders = sorted(one for one in root.iterdir() if one.is_dir() and not one.name.startswith("."))
    photos = ((folder, photo) for folder in folders for photo in sorted(folder.rglob("*")))
    return [
        (folder.name, f"{folder.name}/{photo.relative_to(folder).as_posix()}", photo)
        for folder, photo in photos
        if _is_photo(photo.name)
    ]


def _says(name: str, split: str) -> bool:
    """Whether a tar's name says that it is of a split: `imagenet-train-000001.tar`."""
    return any(part in SPLITS[split] for part in re.split(r"[^a-z]+", name.lower()))


def _is_photo(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _in_tar(path: Path, split: str, marked: bool) -> list[Found]:
    """The images of a split in a tar: those of its folders of that name, or of a tar without such folders all."""
    labels: dict[str, int] = {}
    photos: dict[PurePosixPath, Source] = {}
    for member, source in members(path):
        name = PurePosixPath(member)
        if name.suffix == ".cls":
            text = content(source).strip()
            if not text.isdigit():
                raise ValueError(f"{path}: {printable(name)} holds no class number but {printable(text)}")
            labels[str(name.with_suffix(""))] = int(text)
        elif _is_photo(name.name):
            photos[name] = source
    if labels:
        if marked and not _says(path.name, split):
            return []
        lost = [name for name in photos if str(name.with_suffix("")) not in labels]
        if lost:
            raise ValueError(f"{path}: {printable(lost[0])} has no .cls beside it")
        return [(labels[str(n.with_suffix(""))], f"{path.name}/{n}", source) for n, source in photos.items()]
    under = {name: next((i for i, part in enumerate(name.parts[:-2]) if part in ALL_SPLITS), None) for name in photos}
    if all(place is None for place in under.values()):
        if marked and not _says(path.name, split):
            return []
        return [(n.parts[-2], "/".join(n.parts[-2:]), photos[n]) for n in photos if len(n.parts) > 1]
    mine = [(n, place + 1) for n, place in under.items() if place is not None and n.parts[place] in SPLITS[split]]
    return [(n.parts[place], "/".join(n.parts[place:]), photos[n]) for n, place in mine]


# --- preparing them --------------------------------------------------------------------------------------------------


def crop_ratio_of(size: int, given: float | None = None) -> float:
    """The share of an image's short side that evaluation sees: as given, otherwise 0.875, or 1 for images of at most 32
    pixels."""
    if given is not None:
        return given
    return CROP if size > NATIVE else 1.0


def classifier_input(photo: np.ndarray, size: int, crop_ratio: float | None = None) -> torch.Tensor:
    """A photo, uint8 [H, W, 3] RGB, as a classifier sees it outside of training: float32 [3, size, size], normalised.

    Its short side is resized (bicubic, antialiased) to size / crop_ratio and the centre cut out, exactly as timm does
    with `crop_pct`. crop_ratio None: `crop_ratio_of(size)`.
    """
    ratio = crop_ratio_of(size, crop_ratio)
    image = TF.resize(Image.fromarray(photo), math.floor(size / ratio), transforms.InterpolationMode.BICUBIC)
    return TF.normalize(TF.to_tensor(TF.center_crop(image, size)), MEAN, STD)


@dataclass(frozen=True)
class EvaluationTransform:
    """`classifier_input` of Pillow's pictures."""

    size: int
    crop_ratio: float | None = None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return classifier_input(np.array(image), self.size, self.crop_ratio)


def training_transform(augment: str, size: int, erasing: float = 0.25, crop_ratio: float | None = None) -> Transform:
    """Pillow's picture -> float32 [3, size, size], normalised and augmented.

    augment: "deit" (DeiT's: random resized crop, or of images of at most 32 pixels a crop of the padded image; flip;
    RandAugment m9 mstd0.5; random erasing with that probability), "light" (a crop of the image, padded by an eighth, and
    flip; for tiny images and short runs), "none" (as in evaluation). What is drawn comes from the global generators of
    Python, NumPy and torch. ImportError if "deit" lacks timm.
    """
    if augment == "none":
        return EvaluationTransform(size, crop_ratio)
    if augment == "light":
        steps = [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(size, padding=size // 8),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
        return transforms.Compose(steps)
    require_timm()
    from timm.data import create_transform

    made: Any = create_transform(
        size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        re_prob=erasing,
        re_mode="pixel",
    )
    if size <= NATIVE:
        resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)  # as evaluation does
        made.transforms[0] = transforms.Compose([resize, transforms.RandomCrop(size, padding=4)])
    return made


def require_timm() -> None:
    """ImportError with the cure where timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        raise ImportError("this needs timm: pip install 'blsam[classify]'")


# --- drawing them ----------------------------------------------------------------------------------------------------


def seed_all(*key: int) -> None:
    """Whatever Python, NumPy and torch draw from here on is a function of these numbers."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


class TrainingImages(Dataset):
    """Sample number n is image n of endless epochs, each in an order of its own; order and augmentation are drawn from
    (seed, epoch, image) and nothing else.

    Items are (float32 [3, S, S], label), or what is wrong with the image, as text: an exception would lose its line on
    the way out of a worker process.
    """

    def __init__(self, images: LabelledImages, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, number: int) -> Item:
        epoch, place = divmod(number, len(self.images))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.images))
        i = int(self._order[place])
        seed_all(self.seed, 1, epoch, i)
        return prepared(self.images, i, self.transform)


class EvaluationImages(Dataset):
    """Every `step`th image from `first` on, in order; items as those of `TrainingImages`."""

    def __init__(self, images: LabelledImages, transform: Transform, first: int = 0, step: int = 1) -> None:
        self.images, self.transform = images, transform
        self.mine = range(first, len(images), step)

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, number: int) -> Item:
        return prepared(self.images, self.mine[number], self.transform)


def prepared(images: LabelledImages, i: int, transform: Transform) -> Item:
    """Image i transformed, with its label; text if it cannot be read or transformed."""
    try:
        image = images.read(i)
    except (OSError, ValueError) as error:
        return one_line(error)
    try:
        return transform(image), images.labels[i]
    except (OSError, ValueError, RuntimeError) as error:
        return f"{printable(images.ids[i])}, {image.width} x {image.height}, cannot be prepared ({one_line(error)})"


def collate(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor] | str:
    """A batch, [B, 3, S, S] and labels [B]; or what is wrong with the first damaged image of it."""
    images, labels = [], []
    for item in items:
        if isinstance(item, str):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


def checked(batch: tuple[torch.Tensor, torch.Tensor] | str) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of `collate`; ValueError says which image of it is damaged."""
    if isinstance(batch, str):
        raise ValueError(batch)
    return batch
