"""Eight photos, as files and in tars."""

import pytest

from tests.photos import write_photos, write_tars


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture(scope="session")
def tars(photos, tmp_path_factory):
    return write_tars(photos, tmp_path_factory.mktemp("tars"), 4)
