"""A short run for the tests of training."""

import pytest

from blsam.config import CONFIGS
from blsam.training.settings import TrainSettings
from tests.photos import write_photos
from tests.training.helpers import STUDENT, TEACHER


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture
def settings(photos, tmp_path):
    """A run of 3 steps of the shipped student at 128."""
    return TrainSettings(
        model=CONFIGS["blsam_vit_t"],
        data=(photos,),
        output=tmp_path / "run",
        init=STUDENT,
        teacher="vit_t",
        teacher_checkpoint=TEACHER,
        image_size=128,
        keep_ratio=(0.25, 0.5),
        holdout=0,
        steps=3,
        batch_size=4,
        lr=2e-5,
        workers=0,
        log_every=1,
    )
