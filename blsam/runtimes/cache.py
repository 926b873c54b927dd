"""The folder in which compiled encoders are kept from one start to the next, each in a folder of its own.

`BLSAM_CACHE` names it; otherwise it is `blsam` in the user's cache folder. What was used last stays, up to 8 GB.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import sha256

MOST_BYTES = 8_000_000_000
FACTS = "facts.json"
PREFIX = "encoder-"  # of the folders, so that nothing else is ever removed
MAKING = ".making-"  # before that, while an entry is not whole
ABANDONED = 24 * 3600  # seconds after which whoever was making it is gone

logger = logging.getLogger("blsam")


def default_folder() -> Path | None:
    """Where compiled encoders are kept; None where the user has no cache folder that can be written."""
    if named := os.environ.get("BLSAM_CACHE"):
        return Path(named).absolute()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "blsam"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # no home
        pass
    logger.warning("blsam: no cache folder can be written; BLSAM_CACHE names one")
    return None


def find(root: Path, name: str, facts: dict[str, Any]) -> Path | None:
    """The folder of an entry, None if there is none; ValueError, in one line, if it is not what these facts say."""
    folder = root / (PREFIX + name)
    try:
        found = json.loads((folder / FACTS).read_text())
        whole = found == facts | {"files": digests(folder)}
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():  # or no longer: another process made room
            return None
        whole = False
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise damaged(folder)
    with contextlib.suppress(OSError):  # somebody else's
        os.utime(folder)  # used now
    return folder


def store(root: Path, name: str, facts: dict[str, Any], make: Callable[[Path], None], most: int = MOST_BYTES) -> Path:
    """Keep the files that `make` puts into a folder, and what they are; the entries used longest ago go when there is no
    room. OSError, in one line, where nothing can be written."""
    folder = root / (PREFIX + name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=MAKING))
    except OSError as error:
        raise OSError(
            f"compiled encoders cannot be kept in {root} ({error.strerror or error}); name another folder in "
            "BLSAM_CACHE, or give --no-cache"
        ) from error
    try:
        make(temporary)
        (temporary / FACTS).write_text(json.dumps(facts | {"files": digests(temporary)}))
        temporary.chmod(0o755)  # other users of the folder may read it
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
    """Remove entries, those used longest ago first, until at most `most` bytes are left, and what was never finished.

    Other processes may do the same meanwhile."""
    for folder in root.glob(f"{MAKING}*"):
        if used(folder) < time.time() - ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)
    held = {path: size_of(path) for path in root.glob(f"{PREFIX}*") if path.is_dir()}
    for folder in sorted(held, key=used):
        if sum(held.values()) > most and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            del held[folder]


def used(folder: Path) -> float:
    """When an entry was used last, in seconds; now if it is gone."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return time.time()


def size_of(folder: Path) -> int:
    """Bytes of all that is in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in a folder, but not of what is said of them, nor in folders of the runtime's own."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != FACTS]
    return {path.name: sha256(path) for path in files}
