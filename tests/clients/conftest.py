"""Both sides of a replay, on the weights that ship, at an image size with partial windows."""

from functools import partial
from types import SimpleNamespace

import pytest
import segment_anything as sa
import torch

import blsam
from blsam.options import shipped_checkpoint
from tests.clients.replay import Side, Sides, stock_sam

SIZE = 320  # 20 x 20 tokens in windows of 8


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small gain nothing from a second one, and lose where other work shares the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_stock(checkpoint=None):
    return stock_sam(SIZE, checkpoint)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Weights of the exact and of the routed model as files of SAM's kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {name: folder / f"{name}.pth" for name in ("vit_t", "blsam_vit_t")}
    for name, path in paths.items():
        sam = blsam.sam_model_registry[name](shipped_checkpoint(name), image_size=SIZE)
        torch.save(sam.state_dict(), path)
    return paths


@pytest.fixture(scope="session")
def both(checkpoints):
    """Makes the two sides, ours with an exact or with a routed model."""

    def make(name):
        of_stock = SimpleNamespace(
            SamPredictor=sa.SamPredictor,
            SamAutomaticMaskGenerator=sa.SamAutomaticMaskGenerator,
            sam_model_registry={"vit_t": build_stock},
        )
        registry = blsam.sam_model_registry
        of_ours = SimpleNamespace(
            SamPredictor=blsam.SamPredictor,
            SamAutomaticMaskGenerator=blsam.SamAutomaticMaskGenerator,
            sam_model_registry=dict(registry) | {name: partial(registry[name], image_size=SIZE)},
        )
        stock = Side("segment_anything", of_stock, "vit_t", checkpoints["vit_t"])
        return Sides(stock, Side("blsam", of_ours, name, checkpoints[name]), exact=name == "vit_t")

    return make


@pytest.fixture(scope="session", params=["vit_t", "blsam_vit_t"])
def sides(both, request):
    """`segment_anything`, and ours: an exact model, which gives the same values, or a routed one, of the same form."""
    return both(request.param)


@pytest.fixture(scope="session")
def exact(both):
    return both("vit_t")
