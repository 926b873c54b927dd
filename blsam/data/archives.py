"""Files that lie in a folder, or in a tar, packed or not: where they are, and their bytes."""

from __future__ import annotations

import io
import lzma
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..options import one_line

TARS = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2")
MUCH = 4 * 2**30  # bytes in memory that one is told of
Source = Path | tuple[Path, int, int] | bytes  # a file; a file, offset and length in it; what would be in a file


def content(source: Source) -> bytes:
    """The bytes of a file."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, Path):
        return source.read_bytes()
    path, offset, length = source
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def members(path: Path) -> Iterator[tuple[str, Source]]:
    """Name and source of every file in a tar: in it, where it is a plain one, in memory where it is packed."""
    held = 0
    try:
        with tarfile.open(path) as tar:
            packed = not isinstance(tar.fileobj, io.BufferedReader)
            for member in tar:
                if not member.isfile():
                    continue
                if not packed:
                    yield member.name, (path, member.offset_data, member.size)
                    continue
                file = tar.extractfile(member)
                assert file is not None  # of a file
                held += member.size
                if held > MUCH >= held - member.size:
                    warnings.warn(f"{path} holds over 4 GB, which stay in memory; unpack it instead", stacklevel=2)
                yield member.name, file.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is no tar, or a damaged one ({one_line(error)})") from None
