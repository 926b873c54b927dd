"""The page's server on every Python that it runs on."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")

from fastapi.testclient import TestClient  # noqa: E402

from blsam.demo.server import api  # noqa: E402


def test_an_upload_that_takes_too_long_is_told_so_on_python_3_10(monkeypatch):
    """There `asyncio.TimeoutError` is no `TimeoutError`."""

    class OldTimeoutError(Exception):
        pass

    async def times_out(body, seconds):
        body.close()
        raise OldTimeoutError

    monkeypatch.setattr(asyncio, "TimeoutError", OldTimeoutError)
    monkeypatch.setattr(asyncio, "wait_for", times_out)
    client = TestClient(api(SimpleNamespace()))
    answer = client.post("/api/photos", content=b"x")
    assert answer.status_code == 408 and "took too long" in answer.json()["error"], answer.text
