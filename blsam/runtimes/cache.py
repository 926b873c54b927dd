"""The folder in which compiled encoders are kept from one start to the next, each in a folder of its own.

`BLSAM_CACHE` names it; otherwise it is `blsam` in the user's cache folder. What was used last stays, up to 8 GB.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_BYTES = 8_000_000_000
FACTS = "facts.json"
PREFIX = "encoder-"  # of the folders, so that nothing else is ever removed


def default_folder() -> Path:
    """Where compiled encoders are kept unless a builder is told otherwise."""
    if named := os.environ.get("BLSAM_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blsam"


def find(root: Path, name: str, facts: dict[str, Any]) -> Path | None:
    """The folder of an entry, None if there is none; ValueError, in one line, if it is not what these facts say."""
    folder = root / (PREFIX + name)
    if not folder.is_dir():
        return None
    try:
        found = json.loads((folder / FACTS).read_text())
    except (OSError, ValueError):
        found = None
    if found != facts | {"files": sizes(folder)}:
        raise damaged(folder)
    os.utime(folder)  # used now
    return folder


def store(root: Path, name: str, facts: dict[str, Any], make: Callable[[Path], None], most: int = MOST_BYTES) -> Path:
    """Keep the files that `make` puts into a folder, and what they are; the entries used longest ago go when there is no
    room. OSError, in one line, where nothing can be written."""
    folder = root / (PREFIX + name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=".making-"))
    except OSError as error:
        raise OSError(
            f"compiled encoders cannot be kept in {root} ({error.strerror or error}); name another folder in "
            "BLSAM_CACHE, or give --no-cache"
        ) from error
    try:
        make(temporary)
        (temporary / FACTS).write_text(json.dumps(facts | {"files": sizes(temporary)}))
        try:
            temporary.replace(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(root, folder, most)
    return folder


def damaged(folder: Path) -> ValueError:
    return ValueError(f"{folder} is damaged or of another model; remove it (it is made again), or give --no-cache")


def prune(root: Path, keep: Path, most: int) -> None:
    """Remove entries, those used longest ago first, until at most `most` bytes are left."""
    folders = [path for path in root.glob(f"{PREFIX}*") if path.is_dir()]
    held = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders}
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
        if sum(held.values()) > most and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            del held[folder]


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files in a folder, but not of what is said of them, nor in folders of the runtime's own."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != FACTS]
    return {path.name: path.stat().st_size for path in files}
