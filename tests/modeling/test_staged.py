"""The walk through stages leaves some steps to its models."""

import pytest

from blsam.modeling.classifier import BLVisionTransformer
from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.staged import Staged

LEFT = ("stem", "compared", "scores", "choose", "accept", "asked", "real_cells")


@pytest.mark.parametrize("model", [ImageEncoder, BLVisionTransformer])
def test_every_model_says_what_the_walk_leaves_to_it(model):
    left = {
        name
        for name, f in vars(Staged).items()
        if "NotImplementedError" in getattr(getattr(f, "__code__", f), "co_names", ())
    }
    assert left == set(LEFT)
    assert [name for name in LEFT if getattr(model, name) is getattr(Staged, name)] == []
