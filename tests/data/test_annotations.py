"""Annotation files as they come: good, odd and broken ones."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools

from blsam.data.annotations import Annotations, encode_mask, find_image, to_rle
from blsam.evaluation.instance_ap import InstanceAP
from tests.data.test_masks import BAD as BAD_MASKS
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
        ({"images": [{"height": 4, "width": 4}]}, "one of its images has no id"),
        ({"images": [{"id": 1}]}, "neither coco_url nor file_name: {'id': 1}"),
        ({"images": [{"id": 1, "file_name": None}]}, "neither coco_url nor file_name"),
        ({"images": [3]}, "one of its images has no id: 3"),
        ({"images": [{"id": i, "file_name": "1.png"} for i in (1, 2, 1)]}, "two images share an id: 1"),
        ({"images": [{"id": i, "file_name": "1.png"} for i in (1, "1")]}, "two images share an id: 1"),
        ({"categories": []}, "no categories"),
        ({"categories": [{"name": "a"}]}, "one of its categories has no id"),
        ({"categories": [{"id": 1}, {"id": 1}]}, "two categories share an id: 1"),
        ({"rows": [annotation(7), annotation(7)]}, "two annotations share an id: 7"),
        ({"rows": [annotation(1, segmentation=None)]}, "no annotation can be used: 1 no segmentation"),
        ({"rows": [annotation(1, bbox=[1, 2])]}, "no annotation can be used: 1 box of other than four numbers"),
    ],
)
def test_broken_files_are_named(dataset, changes, message):
    rows = changes.pop("rows") if "rows" in changes else [annotation(1)]
    path, folder = dataset(rows, **changes)
    with pytest.raises(ValueError, match=message):
        Annotations(path, folder, "coco")


def test_other_bad_input(dataset, tmp_path):
    path, folder = dataset([annotation(1)])
    pytest.importorskip("lvis")
    with pytest.raises(ValueError, match="not LVIS"):
        Annotations(path, folder, "lvis")
    with pytest.raises(FileNotFoundError, match="no folder"):
        Annotations(path, tmp_path / "nowhere", "coco")
    with pytest.raises(FileNotFoundError, match="no annotations"):
        Annotations(tmp_path / "nothing.json", folder, "coco")
    for content, words in (
        (b"{", "not json"),
        (b"[" * 10**5, "not json"),
        (b"<html>", "not json"),
        (b"[]", "is not in COCO's format"),
        (b"null", "is not in COCO's format"),
        (gzip.compress(path.read_bytes()), "is compressed; unpack it first"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            Annotations(path, folder, "coco")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_of_other_encodings(dataset, encoding):
    path, folder = dataset([annotation(1)])
    path.write_bytes(path.read_text().encode(encoding))
    assert len(Annotations(path, folder, "coco").api.anns) == 1


# --- odd, yet usable -------------------------------------------------------------------------------------------------


def only(annotations):
    """The one target of the first photo."""
    (target,), left_out = annotations.targets(annotations.photos[0], crowd=False)
    assert not left_out
    return target


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        ([0, 1], [1, 2]),
        ([-5, 3], [1, 2]),
        (["b", "a"], [2, 1]),
        ([7, "a"], [1, 2]),
        ([2.0, 1.0], [2, 1]),
        ([2**70, 5], [2, 1]),
        ([None, 3], [2, 1]),
        ([9, 4], [9, 4]),
    ],
)
def test_ids_that_scorers_cannot_use_are_renumbered_inside(dataset, ids, numbers):
    annotations = Annotations(*dataset([annotation(i) for i in ids]), "coco")
    targets, _ = annotations.targets(annotations.photos[0], crowd=False)
    assert {target.id: target.source_id for target in targets} == dict(zip(numbers, ids))


@pytest.mark.parametrize("ids", [("a", "b"), (-3, 0), ("10", "9"), (2.0, 3.0), (0, 1)])
@pytest.mark.parametrize("category", ["cup", 0, -1, 1.0])
def test_images_and_categories_of_any_ids_score_alike(dataset, ids, category):
    images = [{"id": i, "file_name": f"{n}.png", "height": 4, "width": 4} for n, i in enumerate(ids, 1)]
    rows = [annotation(n, image=i, category_id=category) for n, i in enumerate(ids)]
    path, folder = dataset(rows, images=images, categories=[{"id": category, "name": "x"}])
    annotations = Annotations(path, folder, "coco")
    evaluator = InstanceAP(annotations)
    for photo in annotations.photos:
        (target,), _ = annotations.targets(photo, crowd=False)
        row = {"category_id": target.category_id, "score": 1.0, "counts": encode_mask(target.mask)["counts"]}
        evaluator.process(photo, [row])
    assert evaluator.evaluate()[0]["AP"] == pytest.approx(100)
    assert {row["image_id"] for row in evaluator.results} == set(ids)
    assert {row["category_id"] for row in evaluator.results} == {category}


@pytest.mark.parametrize(
    "changes",
    [
        {"area": None}, {"area": "4"}, {"area": float("nan")}, {"area": -4}, {"area": "much"},
        {"bbox": None}, {"bbox": ["1", "1", "2", "2"]},
        {"iscrowd": None}, {"iscrowd": "0"}, {"iscrowd": False}, {"iscrowd": 0.0},
        {"image_id": "1"}, {"image_id": 1.0}, {"category_id": "1"},
        {"segmentation": SQUARE[0]},
        {"segmentation": [[1, 1], [3, 1], [3, 3], [1, 3]]},
        {"segmentation": [[[1, 1], [3, 1], [3, 3], [1, 3]]]},
        {"segmentation": [*SQUARE, [0, 0, 1, 1], [], [0, 0, 1]]},
        {"segmentation": {"size": [4, 4], "counts": [5, 2, 2, 2, 5]}},
        {"segmentation": {"size": [4.0, 4.0], "counts": [5.0, 2, 2, 2, 5]}},
        {"segmentation": {"size": [4, 4], "counts": [5, 2, 2, 1, 0, 1, 5]}},
        {"segmentation": [{"size": [4, 4], "counts": [5, 2, 2, 2, 5]}]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("without", [(), ("area", "bbox", "iscrowd")])
def test_what_others_write_is_read(dataset, changes, without):
    row = {key: value for key, value in (annotation(1) | changes).items() if key not in without or key in changes}
    annotations = Annotations(*dataset([row]), "coco")
    target = only(annotations)
    assert (target.area, target.box, target.category_id) == (4, (1, 1, 3, 3), 1)
    assert target.mask.sum() == 4 and target.mask[1:3, 1:3].all() and not any(annotations.left_out.values())
    assert annotations.api.anns[1]["iscrowd"] == 0 and isinstance(
        annotations.api.anns[1]["segmentation"], (list, dict)
    )


@pytest.mark.parametrize("crowd", [1, True, "1", "true", 1.0])
def test_crowds_in_words(dataset, crowd):
    annotations = Annotations(*dataset([annotation(1, iscrowd=crowd)]), "coco")
    assert annotations.targets(annotations.photos[0], crowd=False)[1] == {"crowd": 1}


BAD = [
    (None, "annotations that are no json objects"),
    ([], "annotations that are no json objects"),
    ({"image_id": 99}, "annotations without an image"),
    ({"image_id": None}, "annotations without an image"),
    ({"image_id": [1]}, "annotations without an image"),
    ({"category_id": 2}, "annotations of unknown categories"),
    ({"category_id": None}, "annotations of unknown categories"),
    ({"segmentation": None}, "no segmentation"),
    ({"segmentation": ""}, "no segmentation"),
    ({"bbox": [1, 1, 2]}, "box of other than four numbers"),
    ({"bbox": ["a", 1, 2, 2]}, "box of other than four numbers"),
    ({"bbox": [1, 1, float("nan"), 2]}, "box of other than four numbers"),
    ({"bbox": {"x": 1}}, "box of other than four numbers"),
    *(({"segmentation": mask}, reason) for mask, reason in BAD_MASKS),
]


def test_annotations_that_cannot_be_used_are_counted_by_reason(dataset):
    rows = [annotation(i) | row if isinstance(row, dict) else row for i, (row, _) in enumerate(BAD, 2)]
    annotations = Annotations(*dataset([annotation(1), *rows]), "coco")
    assert +annotations.left_out == Counter(reason for _, reason in BAD)
    assert list(annotations.api.anns) == [1]


def test_boxes_without_area_and_outside_are_counted(dataset):
    boxes = [[1, 1, -2, 2], [1, 1, 0, 2], [4, 0, 2, 2], [-5, 0, 5, 2], [1e300, 0, 1e300, 1], [1, 1, 1e-38, 2]]
    annotations = Annotations(*dataset([annotation(i, bbox=box) for i, box in enumerate(boxes, 1)]), "coco")
    left_out = annotations.targets(annotations.photos[0], crowd=False)[1]
    assert left_out == {"box without area": 3, "box outside its image": 3}


@pytest.mark.parametrize("value", [-1, 0, None, "x", float("nan"), True, [], 4.5, 10**9])
@pytest.mark.parametrize("keys", [("height",), ("height", "width")])
def test_impossible_sizes_are_those_of_the_file(dataset, value, keys):
    path, folder = dataset([])
    content = json.loads(path.read_text())
    content["images"] = [{"id": 1, "file_name": "1.png", "height": 9, "width": 4} | dict.fromkeys(keys, value)]
    content["annotations"] = [annotation(1)]
    Image.new("RGB", (6, 5)).save(folder / "1.png")
    path.write_text(json.dumps(content))
    photo = Annotations(path, folder, "coco").photos[0]
    assert (photo.height, photo.width) == (5, 6)
    content["images"] = [{"id": 1, "file_name": "1.png", "height": "5", "width": 6.0}]
    path.write_text(json.dumps(content))
    photo = Annotations(path, folder, "coco").photos[0]
    assert (photo.height, photo.width) == (5, 6) and type(photo.height) is type(photo.width) is int
    (folder / "1.png").write_bytes(b"no image")
    content["images"] = [{"id": 1, "file_name": "1.png"}]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1.png is damaged or not an image"):
        Annotations(path, folder, "coco")


@pytest.mark.parametrize(
    "record",
    [
        {"file_name": "a b.png"}, {"file_name": "./a b.png"}, {"file_name": "a%20b.png"}, {"file_name": "/x/y/a b.png"},
        {"file_name": "images\\a b.png"}, {"file_name": "C:\\data\\a b.png"}, {"file_name": "../../a b.png"},
        {"file_name": "https://host/x/a%20b.png?size=1#top"}, {"coco_url": "http://x/train/a%20b.png"},
        {"coco_url": "http://x/nowhere.png", "file_name": "a b.png"}, {"coco_url": None, "file_name": "a b.png"},
        {"coco_url": "http://[", "file_name": "a b.png"}, {"coco_url": 3, "file_name": "a b.png"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("below", ["", "images", "train"])
def test_files_are_found_by_what_others_call_them(tmp_path, record, below):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    (folder / "a b.png").touch()
    found = find_image(tmp_path, record)
    if below and below not in str(record):
        assert found is None
    else:
        assert found == folder / "a b.png"


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a\0b.png", "x" * 5000, "a/" * 3000, "none.png", "\ud800"])
def test_names_of_no_file(tmp_path, name):
    assert find_image(tmp_path, {"file_name": name}) is None


def test_two_images_that_would_be_one_photo(dataset):
    path, folder = dataset([annotation(1)])
    content = json.loads(path.read_text())
    for image, name in zip(content["images"], ("cam1/1.png", "cam2/1.png")):
        image["file_name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cam2/1\.png and cam1/1\.png|cam1/1\.png and cam2/1\.png"):
        Annotations(path, folder, "coco")
    for image in content["images"]:
        image["file_name"] = "1.png"  # twice the same is the same
    path.write_text(json.dumps(content))
    assert len(Annotations(path, folder, "coco").photos) == 2


def test_a_turned_tiff_without_a_size_has_that_of_its_pixels(dataset):
    path, folder = dataset([annotation(1)], files=())
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "1.tif", exif=exif)
    content = json.loads(path.read_text())
    content["images"] = [{"id": 1, "file_name": "1.tif"}]
    path.write_text(json.dumps(content))
    photo = Annotations(path, folder, "coco").photos[0]
    assert (photo.height, photo.width) == (4, 6)
