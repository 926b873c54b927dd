"""Views of photos, in an order that depends on seed and epoch alone."""

import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from blsam.data.sa1b import list_photos
from blsam.data.views import TarViews, Views, ViewSettings, batches, make_view
from tests.photos import write_photos, write_tars

SETTINGS = ViewSettings(image_size=128, max_objects=4, seed=3)


def _same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("image", "masks", "boxes"))


def test_views_depend_on_seed_epoch_and_photo_alone(photos):
    first, second = (Views(list_photos([photos]), SETTINGS) for _ in range(2))
    for i in (7, 2, 17, 7):
        assert _same(first[i], second[i]) and first[i].key == second[i].key
    assert Counter(first[i].id for i in range(8, 16)) == Counter(p.id for p in list_photos([photos]))
    by_id = {first[i].id: first[i] for i in range(8)}
    other = Views(list_photos([photos])[2:], SETTINGS)  # fewer photos, another order: the same view of each
    for i in range(6):
        assert _same(other[i], by_id[other[i].id])
    again = next(first[i] for i in range(8, 16) if first[i].id == "sa_0")
    assert not _same(again, by_id["sa_0"])
    few = Views(list_photos([photos]), ViewSettings(128, 4, 3, views=1))
    assert all(_same(few[i], by_id[few[i].id]) for i in range(8, 12))  # epoch 1 shows the only view


def test_a_finer_view_is_the_same_view(photos):
    cached = ViewSettings(128, 4, 3, finer=2, targets=lambda photo, view: torch.ones(256, 16, 16))
    settings = (ViewSettings(128, 4, 3), ViewSettings(128, 4, 3, finer=2), cached)
    plain, finer, taught = (Views(list_photos([photos]), one) for one in settings)
    for i in range(4):
        one, two, three = plain[i], finer[i], taught[i]
        assert torch.equal(one.masks, two.masks) and torch.equal(one.boxes, two.boxes) and one.key == two.key
        assert two.image.shape[1:] == (2 * one.image.shape[1], 2 * one.image.shape[2])
        means = F.avg_pool2d(two.image.float(), 2)
        assert torch.corrcoef(torch.stack([means.flatten(), one.image.flatten().float()]))[0, 1] > 0.98
        assert torch.equal(three.image, means.round().byte()) and len(three.target) == 256


def test_masks_of_a_finer_decoder_are_of_the_same_view(photos):
    views = [Views(list_photos([photos]), ViewSettings(128, 4, 3, low_res=n)) for n in (4, 2)]
    for one, two in ((views[0][i], views[1][i]) for i in range(8)):
        assert torch.equal(one.boxes, two.boxes) and torch.equal(one.image, two.image)
        assert two.masks.shape == (len(one.masks), 64, 64)
        means = F.avg_pool2d(two.masks, 2)
        assert (means - one.masks).abs().max() < 1e-4, (means - one.masks).abs().max()


def test_boxes_enclose_their_masks(photos):
    views = Views(list_photos([photos]), SETTINGS)
    for sample in (views[i] for i in range(20)):
        assert len(sample.masks)
        for mask, box in zip(sample.masks, sample.boxes):
            ys, xs = np.nonzero(mask.numpy() > 0.5)
            tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * 4
            assert np.abs(tight - box.numpy()).max() <= 4, (tight, box)


def test_passes_and_processes_cut_up_the_same_steps():
    whole = list(batches(2, 4, 12, 1))
    assert whole == [list(range(24, 36)), list(range(36, 48))]
    pieces = [list(batches(2, 4, 12, 3, rank, 2)) for rank in range(2)]
    assert all(len(one) == 2 for piece in pieces for one in piece)
    steps = [sorted(i for piece in pieces for one in piece[3 * n : 3 * n + 3] for i in one) for n in range(2)]
    assert steps == whole


def _stream(tars, rank=0, world=1, skip=0, batch=2):
    return TarViews(list_photos(tars), SETTINGS, rank, world, batch, skip)


def test_tars_stream_every_photo_once_an_epoch(photos, tars):
    samples = list(islice(_stream(tars), 16))
    for epoch in (samples[:8], samples[8:]):
        assert Counter(s.id for s in epoch) == Counter(p.id for p in list_photos([photos]))
    files = Views(list_photos([photos]), SETTINGS)
    by_id = {files[i].id: files[i] for i in range(8)}
    assert all(_same(s, by_id[s.id]) for s in samples[:8])
    mine = [{s.id for s in islice(_stream(tars, rank, 2), 4)} for rank in range(2)]
    assert not mine[0] & mine[1] and len(mine[0] | mine[1]) == 8


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.e2e)])  # several processes
def test_a_stream_goes_on_where_it_was(tars, workers):
    def read(skip, count):
        loader = DataLoader(_stream(tars, skip=skip), 2, num_workers=workers, collate_fn=list)
        return [s.key for batch in islice(loader, count) for s in batch]

    assert read(6, 3) == read(0, 6)[6:]


def _broken():
    raise OSError("no photo")


def test_damaged_photos_are_black_and_named(photos, tmp_path):
    folder = write_photos(tmp_path / "some", 5)
    (folder / "sa_0.jpg").write_bytes((folder / "sa_0.jpg").read_bytes()[:2000])
    (folder / "sa_1.json").write_text('{"annotations": [{"area": 3}]}')
    (folder / "sa_2.json").write_text("{")
    (folder / "sa_3.json").write_text((folder / "sa_4.json").read_text())  # masks of a photo of another size
    views = Views(list_photos([folder]), SETTINGS)
    found = {views[i].id: views[i] for i in range(5)}
    assert found["sa_3"].damaged == "sa_3: ValueError the photo has 512 x 512 pixels, its annotations 451 x 300"
    assert [name for name in sorted(found) if found[name].damaged] == ["sa_0", "sa_1", "sa_2", "sa_3"]
    assert found["sa_0"].damaged.startswith("sa_0: ValueError the photo is damaged") and not found["sa_0"].image.any()
    assert not len(found["sa_1"].masks)
    for targets, side in ((None, 256), (lambda photo, view: torch.ones(256, 16, 16), 128)):
        view = make_view("a", _broken, 0, ViewSettings(128, 4, finer=2, targets=targets))
        assert view.damaged and view.image.shape == (3, side, side) and (view.target is None or not view.target.any())


def test_what_a_tar_lost_is_named(photos, tmp_path):
    (tar,) = write_tars(photos, tmp_path, 1)
    with tarfile.open(tar) as file:
        cut = file.getmember("./sa_5.json").offset_data + 10
    listed = list_photos([tar])
    tar.write_bytes(tar.read_bytes()[:cut])  # the disk lost its end after the run began
    samples = list(islice(TarViews(listed, SETTINGS, 0, 1, 1, 0), 8))
    assert sorted(s.id for s in samples if s.damaged) == ["sa_5", "sa_6", "sa_7"]
    assert all("not to be read from" in s.damaged for s in samples if s.damaged)


def test_tars_of_macos_stream_all_their_photos(photos, tmp_path):
    names = [f"sa_{i}{suffix}" for i in range(3) for suffix in (".jpg", ".json")]
    with tarfile.open(tmp_path / "mac.tar", "w") as file:
        for name in names:
            hidden = tmp_path / f"._{name}"
            hidden.write_bytes(b"\0\5\x16\7")
            file.add(hidden, hidden.name)
            file.add(photos / name, name)
    samples = list(islice(_stream([tmp_path / "mac.tar"]), 3))
    assert sorted(s.id for s in samples) == ["sa_0", "sa_1", "sa_2"] and not any(s.damaged for s in samples)


def test_photos_far_from_their_json_are_refused_where_they_are_listed(photos, tmp_path):
    with tarfile.open(tmp_path / "apart.tar", "w") as file:
        for suffix in (".jpg", ".json"):
            for i in range(3):
                file.add(photos / f"sa_{i}{suffix}", f"sa_{i}{suffix}")
    with pytest.raises(ValueError, match="do not lie side by side"):
        list_photos([tmp_path / "apart.tar"])
