"""Fields of annotation files one by one, as people's programs write them: json, ids, sizes, boxes, names of files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..files import is_file, printable
from .masks import MOST_PIXELS

Id = int | str


def read_json(path: Path, what: str = "annotations") -> Any:
    """The content of a json file in any of Unicode's encodings; FileNotFoundError or ValueError in one line."""
    if not is_file(path):
        raise FileNotFoundError(f"no {what} at {printable(path, 300)}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, name: str) -> Any:
    """The content of a json file's bytes; ValueError in one line."""
    if data.startswith(b"\x1f\x8b"):
        raise ValueError(f"{name} is compressed; unpack it first (gunzip)")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError(f"{name} is not json (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{name} is not json ({error})") from None


def reasons(left_out: Mapping[str, int]) -> str:
    """What was left out and why, as people read it; empty if nothing was."""
    return ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n)


# --- ids -------------------------------------------------------------------------------------------------------------


def key_of(value: Any) -> str | None:
    """What two ids that mean the same have in common (1, 1.0 and "1"); None of what is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    return str(value).strip() or None


class Numbering:
    """Ids of records as the scorers need them, integers from `lowest`; the file's own where they are such already.

    `numbers`, of the records in their order; `of`, by `key_of` what the file says; `source`, back to that (None of a
    record without an id). ValueError if two share an id.
    """

    def __init__(self, ids: Sequence[Any], what: str, lowest: int) -> None:
        keys = [key_of(value) for value in ids]
        known: set[str] = set()
        for key in keys:
            if key in known:
                raise ValueError(f"two {what} share an id: {printable(key)}")
            if key is not None:
                known.add(key)
        self.numbers = list(ids)
        if not all(type(value) is int and lowest <= value < 2**53 for value in ids):
            order = sorted(range(len(ids)), key=lambda i: _sortable(ids[i]))
            for number, i in enumerate(order, 1):
                self.numbers[i] = number
        self.of: dict[str, int] = {key: number for key, number in zip(keys, self.numbers) if key is not None}
        self.source: dict[int, Id | None] = {
            number: value if key is not None else None for number, key, value in zip(self.numbers, keys, ids)
        }

    def find(self, value: Any) -> int | None:
        """The number that an id of the file stands for; None if there is no such record."""
        key = key_of(value)
        return None if key is None else self.of.get(key)


def _sortable(value: Any) -> tuple[int, float, str]:
    if key_of(value) is None:
        return (2, 0, "")
    return (1, 0, value) if isinstance(value, str) else (0, value, "")


# --- numbers ---------------------------------------------------------------------------------------------------------


def finite(value: Any) -> float | None:
    """A finite number, also one written as text; None of anything else."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def box_of(value: Any) -> tuple[float, float, float, float] | None:
    """x, y, w, h; None of what is not four finite numbers."""
    numbers = [finite(one) for one in value] if isinstance(value, list) and len(value) == 4 else []
    x, y, w, h = numbers if None not in numbers and numbers else (None,) * 4
    return None if x is None or y is None or w is None or h is None else (x, y, w, h)


def wrong_box(corners: tuple[float, float, float, float], height: int, width: int) -> str | None:
    """Why a box x1, y1, x2, y2 cannot be prompted with on an image; None if it can."""
    x1, y1, x2, y2 = corners
    if x2 <= x1 or y2 <= y1:  # also of a width that is lost in the sum
        return "box without area"
    return "box outside its image" if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0 else None


def size_of(record: dict) -> tuple[int, int] | None:
    """height, width of an image's record; None where they are no size that an image can have."""
    height, width = finite(record.get("height")), finite(record.get("width"))
    if height is None or width is None or height != int(height) or width != int(width):
        return None
    return (int(height), int(width)) if min(height, width) > 0 and height * width <= MOST_PIXELS else None


def is_crowd(value: Any) -> bool:
    """`iscrowd` as a number, a truth value, a word or nothing."""
    return str(value).strip().lower() not in ("", "0", "0.0", "false", "no", "none", "null")


# --- files -----------------------------------------------------------------------------------------------------------


def find_image(folder: Path, record: dict) -> Path | None:
    """folder/<split of coco_url>/<name>, or folder/<name>, or where `file_name` leads; None if nothing is there."""
    for tail in _tails(record):
        path = folder.joinpath(*tail)
        if is_file(path):
            return path
    return None


def name_of(record: dict) -> str:
    """What an image's record calls it, as people read it."""
    return next(("/".join(parts[-2:] if url else parts) for parts, url in _names(record)), "")


def _tails(record: dict) -> Iterator[tuple[str, ...]]:
    """Names below a folder, the longest first: of `a/b/c.jpg` all three parts, then two, then c.jpg."""
    for parts, url in _names(record):
        for start in range(max(0, len(parts) - 2) if url else 0, len(parts)):
            yield parts[start:]


def _names(record: dict) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The parts of the paths that a record may mean, and whether they come from a URL."""
    for field in ("coco_url", "file_name"):
        text = record.get(field)
        if not isinstance(text, str):
            continue
        url = field == "coco_url" or "://" in text
        texts = [urlsplit(text).path] if url and _is_url(text) else [text, text.replace("\\", "/")]
        for one in dict.fromkeys([*texts, *map(unquote, texts)]):
            # below the folder, whatever it was below elsewhere
            parts = tuple(part for part in one.split("/") if part not in ("", ".", ".."))
            if parts and "\0" not in one:
                yield parts, url


def _is_url(text: str) -> bool:
    try:
        return bool(urlsplit(text).path)
    except ValueError:
        return False
