"""Annotation files as they come: good, odd and broken ones."""

import numpy as np
import pytest
from pycocotools import mask as rle_tools

from blsam.data.annotations import Annotations, encode_mask, find_image, to_rle
from tests.photos import SQUARE, annotation


def test_masks_of_polygons_plain_and_compressed_rle_are_equal(dataset):
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    plain = {"size": [4, 4], "counts": [5, 2, 2, 2, 5]}  # column by column
    forms = [[list(p) for p in SQUARE], plain, encode_mask(mask)]
    for form in forms:
        assert np.array_equal(rle_tools.decode(to_rle(form, 4, 4)).astype(bool), mask)
    annotations = Annotations(*dataset([annotation(i, segmentation=form) for i, form in enumerate(forms, 1)]), "coco")
    targets, left_out = annotations.targets(annotations.photos[0], crowd=False)
    assert [np.array_equal(target.mask, mask) for target in targets] == [True] * 3 and not left_out
    assert targets[0].box == (1.0, 1.0, 3.0, 3.0)


def test_what_is_left_out_is_counted_by_reason(dataset):
    rows = [
        annotation(1),
        annotation(2, segmentation=[[1, 1, 2, 2]]),  # two corners: pycocotools would take it for a box
        annotation(3, segmentation=[]),
        annotation(4, bbox=[1, 1, 0, 2]),
        annotation(5, segmentation=[[0, 0, 0.1, 0, 0.1, 0.1]]),  # covers no pixel
        annotation(6, iscrowd=1, segmentation={"size": [4, 4], "counts": [5, 2, 9]}),
        annotation(7, image=99),
        annotation(8, segmentation=SQUARE + [[0, 0, 1, 1]]),  # one good polygon, one bad
        annotation(9, area=0.5),
    ]
    annotations = Annotations(*dataset(rows), "coco")
    assert [photo.id for photo in annotations.photos] == [1, 2]
    assert annotations.left_out == {
        "annotations without an image": 1,
        "no polygon of three corners": 2,
        "images not found": 0,
    }
    targets, left_out = annotations.targets(annotations.photos[0], crowd=False)
    assert [target.id for target in targets] == [1, 8, 9]
    assert left_out == {"box without area": 1, "empty mask": 1, "crowd": 1}
    targets, left_out = annotations.targets(annotations.photos[0], crowd=True, min_area=1)
    assert [target.id for target in targets] == [1, 6, 8] and left_out["area below 1"] == 1
    assert annotations.targets(annotations.photos[1], crowd=False) == ([], {})


def test_missing_images_stop_the_run_or_are_left_out(dataset):
    path, folder = dataset([annotation(1), annotation(2, image=2)], files=("2.png",))
    with pytest.raises(FileNotFoundError, match="1 of 2 images .* 1.png.*--skip-missing"):
        Annotations(path, folder, "coco")
    annotations = Annotations(path, folder, "coco", skip_missing=True)
    assert [photo.id for photo in annotations.photos] == [2] and annotations.left_out["images not found"] == 1
    assert annotations.left_out["annotations without an image"] == 0
    (folder / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match="none of the 2 images"):
        Annotations(path, folder, "coco", skip_missing=True)


def test_limit_takes_the_first_by_id(dataset):
    path, folder = dataset([annotation(1), annotation(2, image=2)])
    annotations = Annotations(path, folder, "coco", limit=1)
    assert [photo.id for photo in annotations.photos] == [1] and not any(annotations.left_out.values())
    assert list(annotations.api.anns) == [1]  # what scores the results sees the same photos


def test_lvis_without_file_name_and_crowd_key(dataset):
    pytest.importorskip("lvis")
    rows = [{k: v for k, v in annotation(1).items() if k != "iscrowd"}]
    path, folder = dataset(rows, lvis=True, files=("1.png", "2.png"))
    annotations = Annotations(path, folder, "lvis")
    assert [target.id for target in annotations.targets(annotations.photos[0], crowd=False)[0]] == [1]
    (folder / "train2017").mkdir()
    (folder / "1.png").rename(folder / "train2017" / "1.png")
    record = annotations.api.imgs[1]
    assert find_image(folder, record) == folder / "train2017" / "1.png"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": None}, "needs the lists images, annotations, categories"),
        ({"images": []}, "no images"),
        ({"images": [{"id": 1, "height": 4, "width": 4}]}, "neither coco_url nor file_name"),
        ({"images": [{"id": 1}]}, "one of its images has no number as height, width"),
        ({"images": [{"id": 1, "height": 4, "width": 4, "file_name": "1.png"}] * 2}, "two images share an id"),
        ({"categories": []}, "no categories"),
        ({"rows": [annotation(1, segmentation=None)]}, "annotation 1 needs a bbox .* and a segmentation"),
        ({"rows": [annotation(1, segmentation=SQUARE[0])]}, "annotation 1 needs a bbox .* and a segmentation"),
        ({"rows": [annotation(1, bbox=[1, 2])]}, "annotation 1 needs a bbox"),
        ({"rows": [annotation(1, area=None)]}, "one of its annotations has no number as area"),
        ({"rows": [annotation(0)]}, "must be 1 or more"),
    ],
)
def test_broken_files_are_named(dataset, changes, message):
    rows = changes.pop("rows") if "rows" in changes else [annotation(1)]
    path, folder = dataset(rows, **changes)
    with pytest.raises(ValueError, match=message):
        Annotations(path, folder, "coco")


def test_other_bad_input(dataset, tmp_path):
    path, folder = dataset([annotation(1), annotation(1)])
    with pytest.raises(ValueError, match="share an id"):
        Annotations(path, folder, "coco")
    path, folder = dataset([annotation(1, segmentation={"size": [5, 4], "counts": [5, 2, 13]})])
    annotations = Annotations(path, folder, "coco")
    with pytest.raises(ValueError, match="annotation 1 has the size"):
        annotations.targets(annotations.photos[0], crowd=False)
    path, folder = dataset([annotation(1)])
    pytest.importorskip("lvis")
    with pytest.raises(ValueError, match="not LVIS"):
        Annotations(path, folder, "lvis")
    with pytest.raises(FileNotFoundError, match="no folder"):
        Annotations(path, tmp_path / "nowhere", "coco")
    with pytest.raises(FileNotFoundError, match="no annotations"):
        Annotations(tmp_path / "nothing.json", folder, "coco")
    path.write_text("{")
    with pytest.raises(ValueError, match="not json"):
        Annotations(path, folder, "coco")
