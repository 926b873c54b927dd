"""What a file is by its first bytes, for those that are named as photos and are none that Pillow reads."""

from __future__ import annotations

import re

HEAD = 2048  # bytes that are looked at
CONVERT = "convert it to PNG or JPEG"
HEIC = ("a HEIC photo", "pip install pillow-heif, or convert it to JPEG")
AVIF = ("an AVIF photo", "install Pillow 11.3 or later, or convert it to JPEG")
SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (  # offset, the bytes there, what has them, what to do
    (128, rb"DICM", "a DICOM file", CONVERT),
    (4, rb"ftyp(hei[cfxms]|hev[cxms]|mif1|msf1)", *HEIC),
    (4, rb"ftypavi[fs]", *AVIF),
    (4, rb"ftypcrx ", "a RAW photo (CR3)", CONVERT),
    (4, rb"ftyp", "a video (MP4 or QuickTime)", "save a frame of it as PNG"),
    (4, rb"(moov|mdat|wide)", "a video (QuickTime)", "save a frame of it as PNG"),
    (0, rb"\x1aE\xdf\xa3", "a video (Matroska or WebM)", "save a frame of it as PNG"),
    (0, rb"RIFF....AVI ", "a video (AVI)", "save a frame of it as PNG"),
    (0, rb"\0\0\x01[\xb3\xba]", "a video (MPEG)", "save a frame of it as PNG"),
    (0, rb"(FLV\x01|OggS|0&\xb2u\x8ef\xcf)", "a video", "save a frame of it as PNG"),
    (0, rb"\s*%PDF-", "a PDF", "save a page of it as PNG"),
    (0, rb"%!PS", "a PostScript file", "save a page of it as PNG"),
    (0, rb"(II\*\0....CR|FUJIFILMCCD-RAW|IIR[OS]|IIU\0|MMOR|\0MRM|FOVb)", "a RAW photo", CONVERT),
    (0, rb"(\xff\x0a|\0\0\0\x0cJXL )", "a JPEG XL photo", CONVERT),
    (0, rb"v/1\x01", "an OpenEXR file", CONVERT),
    (0, rb"#\?(RADIANCE|RGBE)", "a Radiance HDR file", CONVERT),
    (0, rb"\x89HDF", "an HDF5 file", CONVERT),
    (0, rb"(\x93NUMPY|PK\x03\x04.{26}[^/]{1,99}\.npy)", "an array of NumPy", "load it with numpy and give the array"),
    (0, rb"(PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ)", "a compressed archive", "unpack it"),
    (0, rb"version https://git-lfs", "a pointer of Git LFS, not the file itself", "git lfs pull"),
    (0, rb"(\xef\xbb\xbf)?\s*<(?i:!doctype html|html|head|body)", "a web page", "download the photo itself"),
    (0, rb"(\xef\xbb\xbf)?\s*(?i:<(\?xml.*<)?(!--.*<)?(!doctype )?svg)", "an SVG drawing", "save it as PNG"),
    (0, rb"(\xef\xbb\xbf)?\s*<\?xml", "an XML file", CONVERT),
)


def name_format(head: bytes) -> tuple[str, str] | None:
    """The first `HEAD` bytes of a file -> what it is and what to do with it, in words; None for what is not known."""
    for offset, signature, name, cure in SIGNATURES:
        if re.match(signature, head[offset:HEAD], re.DOTALL):
            return name, cure
    return None
