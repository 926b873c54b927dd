"""The model that ships behind a server without a browser."""

import pytest

from blsam import sam_model_registry
from blsam.demo.segmenter import Segmenter
from blsam.options import shipped_checkpoint


@pytest.fixture(scope="module")
def sam():
    return sam_model_registry["blsam_vit_t"](shipped_checkpoint("blsam_vit_t"))


@pytest.fixture
def shared(sam):
    return Segmenter(lambda: sam)


@pytest.fixture
def client(shared):
    from fastapi.testclient import TestClient

    from blsam.demo.server import api

    with TestClient(api(shared)) as client:  # one event loop for all threads, as a server has
        yield client
