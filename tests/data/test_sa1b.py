"""Photos to train on: the same whatever they lie in."""

import gzip
import io
import json
import math
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools

from blsam.data.sa1b import choose_photos, list_photos, parse
from blsam.data.views import TarViews, Views, ViewSettings
from tests.photos import write_coco, write_photos, write_tars


def test_folder_tar_and_json_hold_the_same(photos, tars, tmp_path):
    coco = write_coco(photos, tmp_path / "instances.json")
    kinds = [list_photos([photos]), list_photos([tars[0].parent]), list_photos([coco], photos)]
    assert len({len(kind) for kind in kinds}) == 1
    contents = [{p.id.rpartition("/")[2]: p.read() for p in kind} for kind in kinds]
    contents[2] = {f"sa_{int(number) - 1}": content for number, content in contents[2].items()}
    for name, (pixels, annotations) in contents[0].items():
        for other in contents[1:]:
            assert np.array_equal(pixels, other[name][0])
            assert [a["area"] for a in annotations] == [a["area"] for a in other[name][1]]


def test_annotations_made_on_a_turned_photo(tmp_path):
    """Pixels as stored, whatever EXIF says; where the masks lie on the turned photo, EXIF is named."""
    folder = write_photos(tmp_path / "photos", 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.asarray(Image.open(folder / "sa_1.jpg"))
    Image.fromarray(pixels).save(folder / "sa_1.jpg", exif=exif)
    coco = write_coco(folder, tmp_path / "instances.json")
    for photos in (list_photos([folder]), list_photos([coco], folder), list_photos(write_tars(folder, tmp_path, 1))):
        assert photos[1].read()[0].shape == pixels.shape

    upright = Image.open(folder / "sa_1.jpg").transpose(Image.Transpose.ROTATE_90)
    upright.save(folder / "sa_1.jpg", exif=exif)
    for photos in (list_photos([folder]), list_photos([coco], folder), list_photos(write_tars(folder, tmp_path, 1))):
        with pytest.raises(ValueError, match="its annotations 451 x 300: EXIF turns it"):
            photos[1].read()


@pytest.mark.parametrize("suffix", [".webp", ".tiff", ".PNG"])
def test_photos_of_other_formats_are_found(tmp_path, suffix):
    folder = write_photos(tmp_path / "photos", 2)
    for path in folder.glob("*.jpg"):
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    assert [photo.id for photo in list_photos([folder])] == ["sa_0", "sa_1"]


def test_a_share_of_the_photos(photos):
    every = list_photos([photos])
    half, kept = choose_photos(every, 0.5, 0.25, seed=1)
    assert len(half) == 3 and len(kept) == 1 and not set(half) & set(kept)
    more, _ = choose_photos(every, 0.75, 0, seed=1)
    assert set(half) | set(kept) < set(more)
    with pytest.raises(ValueError, match="nothing to train on"):
        choose_photos(every, 0.1, 0.9, seed=1)


def test_a_share_of_tars_is_whole_tars(tars):
    every = list_photos([tars[0].parent])  # 4 tars of 2
    for fraction in (0.25, 0.5, 0.75):
        chosen, _ = choose_photos(every, fraction, 0, seed=2)
        assert len(chosen) == 8 * fraction and len({photo.tar for photo in chosen}) == 4 * fraction
    _, kept = choose_photos(every, 1, 0.5, seed=2, most=2)
    assert len(kept) == 2


def test_paths_that_do_not_do(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for paths, error in (
        ([tmp_path / "none"], "no folder or tar"),
        ([tmp_path / "empty"], "no photo with a .json beside it"),
        ([photos, photos], "two photos have the id sa_0"),
        ([write_coco(photos, tmp_path / "a.json")], "needs --images"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=error):
            list_photos(paths)
    with pytest.raises(FileNotFoundError, match="empty has no photo, and no .tar"):
        list_photos([tmp_path / "empty"], plain=True)
    dotted = write_photos(tmp_path / "dotted", 1)
    for path in list(dotted.iterdir()):
        path.rename(dotted / f"a.b{path.suffix}")
    with pytest.raises(ValueError, match=r"a\.b has a dot in its name"):
        list_photos(write_tars(dotted, tmp_path / "dotted_tar", 1))
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(ValueError, match="is not an uncompressed tar"):
        list_photos([tmp_path / "text.tar"])


def tar_of(path, photos, names, mode="w"):
    """A tar of a photo and its json under several names; texts of their own for others."""
    with tarfile.open(path, mode) as file:
        for name in names:
            source = photos / f"sa_0{Path(name).suffix}"
            data = source.read_bytes() if not name.rpartition("/")[2].startswith("._") else b"\0\5\x16\7resources"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_what_others_leave_in_folders_and_tars(photos, tmp_path, capsys):
    names = ["./._sa_0.jpg", "./._sa_0.json", "./sa_0.jpg", "./sa_0.json", "__MACOSX/._a.jpg", "__MACOSX/._a.json"]
    names += ["part/sa_7.jpg", "part/sa_7.json", "part/alone.jpg", "other.json", "third.json", ".hidden/b.jpg"]
    tar = tar_of(tmp_path / "a.tar", photos, names)
    found = list_photos([tar])
    assert [photo.id for photo in found] == ["sa_7", "sa_0"]
    assert all(len(photo.read()[1]) == 2 for photo in found)
    assert capsys.readouterr().err == f"left out of {tar}: 1 photos without a json, 2 json without a photo\n"
    with tarfile.open(tar) as file:
        file.extractall(tmp_path / "out", filter="data")
    assert [photo.id for photo in list_photos([tmp_path / "out"])] == ["sa_0"]
    assert "2 json without a photo" in capsys.readouterr().err
    pytest.importorskip("webdataset")
    samples = list(islice(TarViews(found, ViewSettings(128, 2), 0, 1, 1, 0), 2))
    assert {sample.id for sample in samples} == {"sa_0", "sa_7"} and not any(sample.damaged for sample in samples)


def test_plain_photos_are_taken_where_they_will_do(photos, tmp_path, capsys):
    folder = write_photos(tmp_path / "some", 3)
    (folder / "sa_1.json").rename(folder / "none.json")
    (folder / "._sa_1.jpg").write_bytes(b"of macOS")
    assert [photo.id for photo in list_photos([folder])] == ["sa_0", "sa_2"]
    assert "1 photos without a json, 1 json without a photo" in capsys.readouterr().err
    found = {photo.id: photo for photo in list_photos([folder], plain=True)}
    assert capsys.readouterr().err == f"left out of {folder}: 1 json without a photo\n"
    pixels, annotations = found["sa_1"].read()
    assert list(found) == ["sa_0", "sa_1", "sa_2"] and annotations == [] and len(found["sa_2"].read()[1]) == 2
    same = next(photo for photo in list_photos([photos]) if photo.id == "sa_1")
    assert np.array_equal(pixels, same.read()[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "sa_1.jpg").save(folder / "sa_1.jpg", exif=exif)
    assert found["sa_1"].read()[0].shape[:2] == pixels.shape[1::-1], "nobody's masks lie on it: upright"
    (folder / "sa_1.jpg").write_bytes(b"")
    views = Views(list(found.values()), ViewSettings(128, 2))
    assert [views[i].id for i in range(3) if views[i].damaged] == ["sa_1"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_named(photos, tmp_path, mode):
    for name in ("a.tar", "a.tar.gz", "a.tgz"):
        tar = tar_of(tmp_path / name, photos, ["sa_0.jpg", "sa_0.json"], mode)
        with pytest.raises(ValueError, match=f"{name} is compressed, not an uncompressed tar; unpack it first"):
            list_photos([tar])
    (tmp_path / "a.tar").unlink()
    with pytest.raises(FileNotFoundError, match="and no .tar; a.tar.gz is compressed, unpack it first"):
        list_photos([tmp_path])


def test_a_tar_cut_anywhere_is_named_or_whole(photos, tmp_path):
    tar = tar_of(tmp_path / "a.tar", photos, ["sa_0.jpg", "sa_0.json", "b.jpg", "b.json"])
    whole = tar.read_bytes()
    for length in range(0, len(whole), 20011):
        tar.write_bytes(whole[:length])
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            list_photos([tar])
        assert "cut short" in str(caught.value) or "no photo with" in str(caught.value)


def test_a_header_that_leads_back_is_refused(photos, tmp_path):
    """A negative size, as of a damaged header, would be read for ever."""
    tar = tar_of(tmp_path / "a.tar", photos, ["sa_0.jpg", "sa_0.json"])
    data = bytearray(tar.read_bytes())
    data[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    tar.write_bytes(data)
    with pytest.raises(ValueError, match="cut short"):
        list_photos([tar])


COUNTS = {"size": [512, 512], "counts": [512 * 512 - 4, 4]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "no list of annotations"),
        ('{"annotations": null}', "no list of annotations"),
        ('{"annotations": [3]}', "no list of annotations"),
        ("", "is not json"),
        ("[" * 10**5, "nested too deeply"),
        (gzip.compress(b"{}", mtime=0), "is compressed"),
        ({"segmentation": None}, "no segmentation"),
        ({"segmentation": COUNTS | {"size": [512, 513]}}, "its annotations 513 x 512"),
        ({"segmentation": COUNTS | {"size": [10**5, 10**5]}}, "its annotations 100000 x 100000"),
        ({"segmentation": COUNTS | {"size": ["\r", 512]}}, r"its annotations 512 x '\\r'"),
        ({"segmentation": COUNTS | {"counts": [1, 2]}}, "does not fill its size"),
        ({"segmentation": COUNTS | {"counts": "~~~~"}}, "cannot be read"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_json_beside_a_photo_that_does_not_do(photos, text, words):
    data = json.dumps({"annotations": [text]}).encode() if isinstance(text, dict) else text
    with pytest.raises(ValueError, match=words):
        parse((photos / "sa_0.jpg").read_bytes(), data if isinstance(data, bytes) else data.encode())


def test_json_beside_a_photo_that_does(photos):
    image = (photos / "sa_0.jpg").read_bytes()
    rows = [
        {"segmentation": COUNTS, "area": "4"},
        {"segmentation": COUNTS, "area": math.nan},
        {"segmentation": COUNTS},
    ]
    rows += [{"segmentation": [[0, 508, 1, 508, 1, 512, 0, 512]]}]
    text = json.dumps({"annotations": rows})
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        _, annotations = parse(image, text.encode(encoding))
        assert [one["area"] for one in annotations] == [4] * 4
        assert {bytes(one["segmentation"]["counts"]) for one in annotations[:3]} == {
            rle_tools.frPyObjects(COUNTS, 512, 512)["counts"]
        }
