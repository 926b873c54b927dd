"""What the server refuses, and several visitors at once."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage import data

from blsam.demo.segmenter import MAX_POINTS, Segmenter
from blsam.modeling.routing import Routing
from blsam.runtimes.engine import Engine
from tests.demo.helpers import CUP, JPEG, PNG, file_of, png_header, upload

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'blsam[demo]'")

from fastapi.testclient import TestClient  # noqa: E402

from blsam.demo.server import api, checked_ratio  # noqa: E402

# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "status", "message"),
    [
        (b"", 400, "empty"),
        (b"a text that somebody named photo.jpg", 415, "no photo that can be read"),
        (png_header(20_000, 20_000), 413, "megapixels"),
        (png_header(8_000, 8_000), 413, "8000 x 8000"),
        (png_header(5_000, 1), 400, "too narrow"),
        (png_header(1_000, 1_000), 400, "damaged"),
        (JPEG[: len(JPEG) // 2], 400, "damaged"),
        (PNG[: len(PNG) // 2], 400, "damaged"),
        (JPEG[:100], 415, "no photo that can be read"),
        (b"\xff" * 31 * 2**20, 413, "larger than 30 MB"),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, bytes) else str(len(value)),
)
def test_bad_files_are_refused_in_one_line(client, shared, contents, status, message):
    answer = client.post("/api/photos", content=contents)
    assert answer.status_code == status and message in answer.json()["error"], answer.text
    assert "\n" not in answer.json()["error"] and len(shared.photos) == 0
    upload(client, PNG)  # and it goes on


def test_a_file_without_a_length_is_cut_off_at_the_limit(client, monkeypatch):
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(60):
            sent += 2**20
            yield b"\xff" * 2**20

    answer = client.post("/api/photos", content=chunks())
    assert answer.status_code == 413 and "larger than 30 MB" in answer.json()["error"]


@pytest.mark.parametrize(
    "change",
    [
        {"points": [], "box": None},
        {"points": "many"},
        {"points": [[1, 2]]},
        {"points": [[1, 2, 3, 4, 5, 6]]},
        {"points": [[1, 2, 3]]},
        {"points": [[1, 2, 0.5]]},
        {"points": [["a", 2, 1]]},
        {"points": [[1e9, 2, 1]]},
        {"points": [[float("nan"), 2, 1]]},
        {"points": [[[1]], 2, 1]},
        {"points": [[10**400, 2, 1]]},
        {"points": [[1, 1, 1]] * (MAX_POINTS + 1)},
        {"points": [], "box": [400, 10, 160, 245]},
        {"box": [1, 2, 3]},
        {"box": [700, 700, 800, 800]},
        {"box": "here"},
        {"keep_ratio": 0},
        {"keep_ratio": 1.2},
        {"keep_ratio": None},
        {"keep_ratio": float("nan")},
        {"keep_ratio": [1]},
    ],
)
def test_bad_prompts_are_refused(client, change):
    id = upload(client, JPEG)
    body = json.dumps({**CUP, **change})
    answer = client.post(f"/api/photos/{id}/masks", content=body)
    assert answer.status_code == 400 and answer.json()["error"], answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"name": "' + b"x" * 2**20 + b'"}'])
def test_bodies_that_are_no_question(client, body):
    id = upload(client, JPEG)
    answer = client.post(f"/api/photos/{id}/masks", content=body)
    assert answer.status_code in (400, 413) and answer.json()["error"]


def test_candidates_photos_and_actions_that_are_not_there(client):
    id = upload(client, JPEG)
    for candidate in (3, -1, "0", None, True, 0.5):
        answer = client.post(f"/api/photos/{id}/export/mask.png", json={**CUP, "candidate": candidate})
        assert answer.status_code == 400 and "candidate" in answer.json()["error"]
    assert client.post(f"/api/photos/{id}/export/passwd", json=CUP).status_code == 404
    answer = client.post("/api/photos/0123/masks", json=CUP)
    assert answer.status_code == 404 and "open it again" in answer.json()["error"]


def test_a_thousand_clicks_are_answered(client):
    id = upload(client, JPEG)
    points = np.random.default_rng(0).uniform((0, 0), (600, 400), (MAX_POINTS, 2)).round(1)
    wanted = {"points": [[x, y, i % 2] for i, (x, y) in enumerate(points.tolist())], "keep_ratio": 0.25}
    answer = client.post(f"/api/photos/{id}/masks", json=wanted)
    assert answer.status_code == 200 and len(answer.json()["masks"]) == 3


# --- several visitors ------------------------------------------------------------------------------------------------


def test_ten_visitors_get_their_own_masks(sam):
    pictures = [data.coffee(), data.astronaut(), data.chelsea(), data.rocket()]
    visits = []
    for i in range(10):
        picture = np.roll(pictures[i % 4], 20 * i, axis=1)
        height, width = picture.shape[:2]
        point = [width * (0.3 + 0.04 * i), height * 0.5, 1]
        visits.append((file_of(picture), {"points": [point], "keep_ratio": (0.1, 0.25, 1)[i % 3]}))

    def answers(client, visit):
        id = upload(client, visit[0])
        return [client.post(f"/api/photos/{id}/masks", json=visit[1]).json()["masks"] for _ in range(3)]

    alone = [answers(TestClient(api(Segmenter(lambda: sam))), visit)[0] for visit in visits]
    with TestClient(api(Segmenter(lambda: sam))) as client, ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda visit: answers(client, visit), visits))
    for visitor, (one, several) in enumerate(zip(alone, together)):
        assert all(answer == one for answer in several), f"visitor {visitor} got other masks than alone"


def test_one_encode_for_a_photo_and_keep_ratio(client, sam, monkeypatch):
    calls, encode = [], sam.encode_images
    monkeypatch.setattr(sam, "encode_images", lambda images, keep_ratio: calls.append(keep_ratio) or encode(images))
    id = upload(client, JPEG)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.post(f"/api/photos/{id}/masks", json=CUP), range(8)))
    client.post(f"/api/photos/{upload(client, JPEG)}/encode", json={"keep_ratio": 0.251})  # the same, and the same
    assert calls == [0.25]
    client.post(f"/api/photos/{id}/encode", json={"keep_ratio": 0.5})
    assert calls == [0.25, 0.5]
    assert sam.image_encoder.keep_ratio == 0.25, "a visitor's keep ratio stays with the visitor"


def test_seconds_are_of_a_runtime(client, sam, monkeypatch):
    """The page compiles two keep ratios alone: the bars of the others are torch's."""
    engine = Engine("openvino", None, only=frozenset((0.25, 1.0)))
    monkeypatch.setattr(sam.image_encoder, "engine", engine)
    monkeypatch.setattr(engine, "encode", lambda encoder, x, sizes, ratio: (torch.zeros(1, 256, 8, 8), Routing()))
    id, found = upload(client, JPEG), {}
    for ratio in (0.25, 0.5, 1.0):
        found[ratio] = client.post(f"/api/photos/{id}/encode", json={"keep_ratio": ratio}).json()["runtime"]
    assert found == {0.25: "openvino", 0.5: "torch", 1.0: "openvino"}


def test_keep_ratios_come_in_hundredths():
    assert checked_ratio("0.254") == 0.25 and checked_ratio(1) == 1


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
