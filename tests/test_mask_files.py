"""Everything in many photos: what there is on disk, and that no photo is lost or done twice."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

from blsam.data.annotations import encode_mask
from blsam.mask_files import MAKING, find_photos, mask_photos
from blsam.options import UsageError

SIZE = (6, 9)


def photo(value):
    return Image.fromarray(np.full((*SIZE, 3), value, np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Three photos of one grey each, 20, 40 and 60, one of them deeper, a hidden file and a damaged one."""
    root = tmp_path / "photos"
    (root / "deep" / "er").mkdir(parents=True)
    for name, value in (("b.png", 20), ("a.JPG", 40), ("deep/er/c.png", 60)):
        photo(value).save(root / name, "JPEG" if name.endswith("JPG") else "PNG")
    (root / "._b.png").write_bytes(b"macOS")
    (root / "notes.txt").write_text("no photo")
    (root / "d.png").write_bytes((root / "b.png").read_bytes()[:30])
    return root


def generate(image):
    """As many masks as the photo's grey has twenties, the first of one row, the next of two."""
    found = []
    for i in range(round(image[0, 0, 0] / 20)):
        mask = np.zeros(image.shape[:2], bool)
        mask[: i + 1] = True
        found.append(
            {
                "segmentation": encode_mask(mask),
                "area": int(mask.sum()),
                "bbox": [0.0, 0.0, 9.0, i + 1.0],
                "predicted_iou": 0.9,
                "point_coords": [[4.5, 0.5]],
                "stability_score": 0.8,
                "crop_box": [0, 0, 9, 6],
            }
        )
    return found


def test_photos_of_folders_tars_and_files(folder, tmp_path):
    names = ["a", "b", "d", "deep/er/c"]
    assert [one.name for one in find_photos([folder], "rle")] == names
    assert [one.file_name for one in find_photos([folder], "rle")] == ["a.JPG", "b.png", "d.png", "deep/er/c.png"]
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        path = tmp_path / f"all{suffix}"
        with tarfile.open(path, mode) as tar:
            for file in sorted(folder.rglob("*")):
                tar.add(file, file.relative_to(folder), recursive=False)
        assert [one.name for one in find_photos([path], "rle")] == names
    assert [one.name for one in find_photos([folder / "b.png"], "rle")] == ["b"]
    with pytest.raises(FileNotFoundError, match="no photo, folder or tar at"):
        find_photos([tmp_path / "nothing"], "rle")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no photo"):
        find_photos([tmp_path / "empty"], "rle")
    photo(1).save(folder / "b.jpg")
    with pytest.raises(UsageError, match="b.jpg and b.png have the same name"):
        find_photos([folder], "rle")


def test_a_photo_beside_a_folder_of_its_name(folder, tmp_path):
    photo(20).save(folder / "deep.png")
    mask_photos(find_photos([folder], "rle"), generate, tmp_path / "rle", "rle", {})
    assert (tmp_path / "rle" / "deep.json").is_file() and (tmp_path / "rle" / "deep" / "er" / "c.json").is_file()
    with pytest.raises(
        UsageError, match="deep.png and deep/er/c.png would lie in one folder; choose another --format"
    ):
        find_photos([folder], "png")


def test_a_folder_of_masks_is_not_taken_for_a_photo_s(folder, tmp_path):
    mask_photos(find_photos([folder], "png"), generate, tmp_path, "png", {})
    photo(20).save(folder / "deep.png")
    done = mask_photos(find_photos([folder / "a.JPG"], "png"), generate, tmp_path, "png", {})
    assert (done.made, done.kept) == (0, 1)


def test_a_tar_cannot_lead_out_of_the_folder(tmp_path):
    path, data = tmp_path / "evil.tar", io.BytesIO()
    photo(20).save(data, "PNG")
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("../out.png")
        member.size = len(data.getvalue())
        tar.addfile(member, io.BytesIO(data.getvalue()))
    with pytest.raises(ValueError, match="outside the folder"):
        find_photos([path], "rle")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_coco_json(folder, tmp_path, capsys):
    output = tmp_path / "out"
    done = mask_photos(find_photos([folder], "rle"), generate, output, "coco", {"model": "x"})
    assert (done.made, done.kept, done.masks) == (3, 0, 2 + 1 + 3)
    assert len(done.damaged) == 1 and done.damaged[0].startswith("d.png: the photo is damaged")
    coco = COCO(str(output / "coco.json"))
    assert [coco.imgs[i]["file_name"] for i in sorted(coco.imgs)] == ["a.JPG", "b.png", "deep/er/c.png"]
    for number, count in ((1, 2), (2, 1), (3, 3)):
        annotations = coco.imgToAnns[number]
        assert [int(coco.annToMask(one).sum()) for one in annotations] == [9 * (i + 1) for i in range(count)]
    before = files(output)
    done = mask_photos(find_photos([folder], "rle"), generate, output, "coco", {"model": "x"})
    assert (done.made, done.kept, done.masks) == (0, 3, 0) and files(output) == before
    with pytest.raises(UsageError, match="model x then, y now"):
        mask_photos(find_photos([folder], "rle"), generate, output, "coco", {"model": "y"})


def test_sam_s_own_formats(folder, tmp_path):
    for form in ("rle", "png"):
        mask_photos(find_photos([folder], "rle"), generate, tmp_path / form, form, {})
    expected = generate(np.asarray(photo(60)))
    assert json.loads((tmp_path / "rle" / "deep" / "er" / "c.json").read_text()) == expected
    place = tmp_path / "png" / "deep" / "er" / "c"
    assert sorted(path.name for path in place.iterdir()) == ["0.png", "1.png", "2.png", "metadata.csv"]
    rows = list(csv.DictReader((place / "metadata.csv").open()))
    for i, (row, record) in enumerate(zip(rows, expected, strict=True)):
        mask = np.asarray(Image.open(place / f"{i}.png"))
        assert np.array_equal(mask, 255 * rle_tools.decode(record["segmentation"]))
        assert (row["id"], row["area"], row["bbox_h"]) == (str(i), str(record["area"]), f"{i + 1}.0")
        assert (row["point_input_x"], row["predicted_iou"], row["crop_box_w"]) == ("4.5", "0.9", "9")


@pytest.mark.parametrize("form", ["coco", "rle", "png"])
def test_a_run_that_broke_off_goes_on(folder, tmp_path, form):
    photos, whole, output = find_photos([folder], form), tmp_path / "whole", tmp_path / "out"
    mask_photos(photos, generate, whole, form, {})
    calls = []

    def breaks(image):
        calls.append(image[0, 0, 0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(image)

    with pytest.raises(KeyboardInterrupt):
        mask_photos(photos, breaks, output, form, {})
    (output / f"{MAKING}torn").mkdir()  # what a kill would leave
    (output / f"{MAKING}torn" / "0.png").write_bytes(b"half")
    assert len(files(output)) < len(files(whole))
    done = mask_photos(photos, generate, output, form, {})
    assert (done.made, done.kept) == (2, 1)
    assert files(output) == files(whole)
