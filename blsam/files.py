"""Files: written whole or not at all, hashed piece by piece, and what is needed to make a figure again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__

PIECE = 2**20  # bytes hashed at a time
PACKAGES = ("torch", "numpy", "segment-anything", "pycocotools", "lvis", "opencv-python", "openvino", "onnxruntime")


def write_atomically(path: str | Path, write: Callable[[str], object]) -> None:
    """Call `write` with a temporary file beside `path`, then put it in its place in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_bytes(path: str | Path, data: bytes) -> None:
    """A file's content, atomically."""
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))


def write_text(path: str | Path, text: str) -> None:
    """Text in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Json, atomically; `indent=None` for long lists."""

    def write(temporary: str) -> None:
        with open(temporary, "w") as file:
            json.dump(content, file, indent=indent)
            file.write("\n")

    write_atomically(path, write)


def differing_settings(path: Path, settings: dict[str, Any]) -> str:
    """What a run's json of settings says otherwise than `settings`, in words; "" where nothing does, or there is none."""
    if not path.is_file():
        return ""
    earlier = json.loads(path.read_text())
    names = sorted(key for key in settings.keys() | earlier.keys() if settings.get(key) != earlier.get(key))
    return ", ".join(f"{key} {earlier.get(key)} then, {settings.get(key)} now" for key in names)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is there; of a name that no file can have, or in a folder that may not be looked into: no."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def printable(value: object, most: int = 80) -> str:
    """What a file holds, to be said in a message: one line without control characters, cut at `most` characters."""
    text = " ".join(str(value)[: 2 * most].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def sha256(path: str | Path) -> str:
    """Of a file's bytes, in hexadecimal; of any size, since it is never held whole."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def provenance() -> dict[str, Any]:
    """Versions, and the git revision (None outside a checkout; "-dirty" with changes)."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "blsam": __version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"versions": versions, "git_revision": _git_revision()}


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude", "*"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
