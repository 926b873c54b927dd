"""Fixtures that several folders use."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from blsam import SamPredictor, sam_model_registry
from blsam.checkpoint import save
from blsam.images import read_image
from blsam.options import shipped_checkpoint
from tests.helpers import DATA
from tests.photos import coco_photos, write_coco, write_photos

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the machine


@pytest.fixture(scope="session", autouse=True)
def runtimes(tmp_path_factory):
    """What is compiled is kept for these tests alone, and what asks for no runtime runs in torch on any machine; so do the
    programs that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLSAM_CACHE", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("BLSAM_RUNTIME", "torch")
        yield


@pytest.fixture
def one_thread():
    """Sums are in one order, and threads of tiny products do not wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dataset(tmp_path):
    """Makes a file with annotations on two photos of 4 x 4 pixels."""

    def make(annotations, lvis=False, files=("1.png", "2.png"), **changes):
        images = [{"id": i, "file_name": f"{i}.png", "height": 4, "width": 4} for i in (2, 1)]
        if lvis:
            more = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
            images = [
                {"id": i, "coco_url": f"http://x/train2017/{i}.png", "height": 4, "width": 4} | more for i in (2, 1)
            ]
        for name in files:
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name)
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "a", "frequency": "f"}],
        }
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content | changes))
        return path, tmp_path

    return make


@pytest.fixture(scope="session")
def annotated(tmp_path_factory):
    """A folder of photos and their json in COCO's format."""
    folder = write_photos(tmp_path_factory.mktemp("photos"))
    return folder, write_coco(folder, folder.parent / "annotations.json")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Random weights of the dense and the routed model at 64, the latter warm-started from the former."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    paths = {name: folder / f"{name}.safetensors" for name in ("vit_t", "blsam_vit_t")}
    for name, start in (("vit_t", None), ("blsam_vit_t", paths["vit_t"])):
        sam = sam_model_registry[name](start, image_size=64)
        save(paths[name], sam.state_dict(), {"model": name, "image_size": "64"})
    return paths


@pytest.fixture(scope="session")
def small():
    return sam_model_registry["blsam_vit_t"](shipped_checkpoint("blsam_vit_t"), image_size=256)


@pytest.fixture(scope="session")
def predictor():
    """The dense model that ships, on the first COCO photo."""
    if not (DATA / "coco").is_dir():
        pytest.skip("no coco photos (BLSAM_DATA)")
    predictor = SamPredictor(sam_model_registry["vit_t"](shipped_checkpoint("vit_t")))
    predictor.photo = coco_photos(1).photos[0]
    predictor.set_image(read_image(predictor.photo.path, upright=False))
    return predictor


@pytest.fixture(scope="session")
def targets(predictor):
    return coco_photos(1).targets(predictor.photo, crowd=False)[0]
