"""Products of tiny encoders are faster in one thread."""

import pytest


@pytest.fixture(autouse=True)
def in_one_thread(one_thread):
    pass
