"""Photos to train on: the same whatever they lie in."""

import numpy as np
import pytest

from blsam.data.sa1b import choose_photos, list_photos
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
        ([tmp_path / "none"], "no folder"),
        ([tmp_path / "empty"], "no photo with a .json beside it"),
        ([photos, photos], "two photos have the id sa_0"),
        ([write_coco(photos, tmp_path / "a.json")], "needs --images"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=error):
            list_photos(paths)
    dotted = write_photos(tmp_path / "dotted", 1)
    for path in list(dotted.iterdir()):
        path.rename(dotted / f"a.b{path.suffix}")
    with pytest.raises(ValueError, match=r"a\.b has a dot in its name"):
        list_photos(write_tars(dotted, tmp_path / "dotted_tar", 1))
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(ValueError, match="is not an uncompressed tar"):
        list_photos([tmp_path / "text.tar"])
