"""The table of `blsam models`."""

import pytest
import torch

from blsam import build_sam
from blsam.commands.models import parameters
from blsam.config import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("image_size", [1024, 512])
def test_parameters_are_those_of_the_model_that_is_built(name, image_size):
    with torch.device("meta"):
        sam = build_sam(CONFIGS[name], image_size=image_size)
    assert parameters(CONFIGS[name], image_size) == sum(p.numel() for p in sam.parameters())
