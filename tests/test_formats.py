"""Files that are named as photos and are something else."""

import io

import numpy as np
import pytest

from blsam.formats import name_format
from tests.demo.helpers import JPEG, PNG

BOX = b"\0\0\0\x18ftyp"


def array_file(save, value):
    buffer = io.BytesIO()
    save(buffer, value)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (bytes(128) + b"DICM\2\0", "DICOM"),
        (BOX + b"heic\0\0\0\0mif1", "HEIC"),
        (BOX + b"mif1\0\0\0\0heic", "HEIC"),
        (BOX + b"avif\0\0\0\0", "AVIF"),
        (BOX + b"crx \0\0\0\1", "RAW"),
        (BOX + b"isom\0\0\2\0", "video"),
        (BOX + b"qt  \0\0\2\0", "video"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "video"),
        (b"\x1aE\xdf\xa3\x9fB\x86", "video"),
        (b"RIFF\x10\0\0\0AVI LIST", "video"),
        (b"\0\0\1\xba!", "video"),
        (b"%PDF-1.7\n", "PDF"),
        (b"%!PS-Adobe-3.0", "PostScript"),
        (b"II*\0\x10\0\0\0CR\2\0", "RAW"),
        (b"FUJIFILMCCD-RAW 0201", "RAW"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"v/1\1\2\0\0\0", "OpenEXR"),
        (b"#?RADIANCE\n", "Radiance"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (array_file(np.save, np.zeros(3)), "NumPy"),
        (array_file(np.savez, np.zeros(3)), "NumPy"),
        (b"PK\3\4\x14\0", "archive"),
        (b"\x1f\x8b\x08", "archive"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\n<!DOCTYPE HTML><html>", "web page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg">', "SVG"),
        (b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg>', "SVG"),
        (b'<?xml version="1.0"?><note>', "XML"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_file_is_by_its_first_bytes(head, name):
    found = name_format(head)
    assert found and name in found[0] and found[1], found


@pytest.mark.parametrize("head", [b"", b"a text", b"{}", JPEG[:2048], PNG[:2048]], ids=range(5))
def test_photos_and_unknown_files_have_no_such_name(head):
    assert name_format(head) is None
