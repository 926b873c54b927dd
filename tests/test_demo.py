"""The demo without a browser: what it accepts, what it refuses, what it hands out, several visitors at once."""

import base64
import io
import json
import socket
import struct
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from skimage import data

from blsam import SamPredictor, sam_model_registry
from blsam.cli import main
from blsam.options import shipped_checkpoint

pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")

from fastapi.testclient import TestClient  # noqa: E402

from blsam.demo import photos, segmenter  # noqa: E402
from blsam.demo.photos import BoundedCache, Refused, check_header, open_photo  # noqa: E402
from blsam.demo.segmenter import MAX_POINTS, MAX_WAITING, Prompt, Segmenter  # noqa: E402
from blsam.demo.server import api, checked_ratio  # noqa: E402

CUP = {"points": [[270, 60, 1], [40, 380, 0]], "box": [160, 10, 400, 245], "keep_ratio": 0.25}


def file_of(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sam():
    return sam_model_registry["blsam_vit_t"](shipped_checkpoint("blsam_vit_t"))


@pytest.fixture
def shared(sam):
    return Segmenter(sam)


@pytest.fixture
def client(shared):
    with TestClient(api(shared)) as client:  # one event loop for all threads, as a server has
        yield client


def upload(client, contents):
    answer = client.post("/api/photos", content=contents)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


# --- masks and files -------------------------------------------------------------------------------------------------


def test_files_hold_the_mask_of_a_predictor(client, sam, tmp_path):
    id = upload(client, file_of(data.coffee()))
    found = client.post(f"/api/photos/{id}/masks", json=CUP).json()
    predictor = SamPredictor(sam)
    predictor.set_image(data.coffee())
    points = np.array(CUP["points"], float)
    masks, scores, _ = predictor.predict(points[:, :2], points[:, 2], np.array(CUP["box"]))
    assert np.allclose([mask["score"] for mask in found["masks"]], scores, atol=1e-5)

    best = int(scores.argmax())
    wanted = {**CUP, "candidate": best, "name": "coffee.png"}
    mask = Image.open(io.BytesIO(client.post(f"/api/photos/{id}/export/mask.png", json=wanted).content))
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), masks[best] * 255)
    cut = np.asarray(Image.open(io.BytesIO(client.post(f"/api/photos/{id}/export/cutout.png", json=wanted).content)))
    assert np.array_equal(cut[..., :3], data.coffee()) and np.array_equal(cut[..., 3], masks[best] * 255)
    path = tmp_path / "coco.json"
    path.write_bytes(client.post(f"/api/photos/{id}/export/coco.json", json=wanted).content)
    coco = COCO(path)
    (annotation,) = coco.loadAnns(coco.getAnnIds(catIds=coco.getCatIds(["object"])))
    assert coco.loadImgs(1)[0] == {"id": 1, "file_name": "coffee.png", "height": 400, "width": 600}
    assert np.array_equal(coco.annToMask(annotation), masks[best])
    rows, columns = np.nonzero(masks[best])
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert annotation["bbox"] == box and annotation["area"] == masks[best].sum() > 5000
    assert annotation["score"] == pytest.approx(scores[best], abs=1e-5)


def test_the_overlay_is_the_mask_at_the_size_of_the_preview(client, shared):
    large = np.asarray(Image.fromarray(data.coffee()).resize((2400, 1600)))
    id = upload(client, file_of(large, "JPEG"))
    wanted = {"points": [[1080, 480, 1]], "keep_ratio": 0.25}
    found = client.post(f"/api/photos/{id}/masks", json=wanted).json()["masks"]
    preview = Image.open(io.BytesIO(client.get(f"/api/photos/{id}/preview").content))
    assert preview.size == (1280, 853)
    masks = shared.masks(shared.photo(id), 0.25, Prompt(((1080.0, 480.0, 1),))).masks
    for candidate, (mask, record) in enumerate(zip(masks, found)):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(record["overlay"]))).convert("RGBA"))[..., 3] > 0
        around = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) > 0  # the edge is a line that covers both sides
        assert (mask <= shown).all() and (shown <= around).all()
        export = client.post(f"/api/photos/{id}/export/mask.png", json={**wanted, "candidate": candidate})
        full = Image.open(io.BytesIO(export.content))
        assert full.size == (2400, 1600)
        small = np.asarray(full.resize(preview.size, Image.Resampling.BILINEAR)) > 127
        iou = (mask & small).sum() / (mask | small).sum()
        assert iou > 0.98, f"candidate {candidate}: the mask shown and the one handed out agree to {iou:.3f}"


def test_a_turned_photo_is_segmented_upright(client):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    stored = np.rot90(data.coffee())
    answer = client.post("/api/photos", content=file_of(stored, "JPEG", quality=95, exif=exif)).json()
    assert (answer["width"], answer["height"]) == (600, 400)
    cut = client.post(f"/api/photos/{answer['id']}/export/cutout.png", json={**CUP, "candidate": 0}).content
    cut = np.asarray(Image.open(io.BytesIO(cut)))
    assert np.abs(cut[..., :3].astype(int) - data.coffee()).mean() < 4


def test_everything_of_a_large_photo_is_at_its_own_size(client, shared, tmp_path, monkeypatch):
    monkeypatch.setitem(segmenter.EVERYTHING, "points_per_side", 12)
    large = np.asarray(Image.fromarray(data.astronaut()).resize((1600, 1600)))
    id = upload(client, file_of(large))
    found = client.post(f"/api/photos/{id}/everything", json={"keep_ratio": 1}).json()
    overlay = Image.open(io.BytesIO(base64.b64decode(found["overlay"])))
    assert overlay.size == (1280, 1280) and len(np.unique(np.asarray(overlay))) == found["count"] + 2
    path = tmp_path / "coco.json"
    path.write_bytes(client.post(f"/api/photos/{id}/export/everything.json", json={"keep_ratio": 1}).content)
    coco = COCO(path)
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) == found["count"] > 5
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        assert mask.shape == (1600, 1600) and mask.sum() == annotation["area"] > 0
    shown = [record["area"] for record in shared.everything(shared.photo(id), 1.0)]
    ratio = np.array([annotation["area"] for annotation in annotations]) / shown
    assert np.abs(ratio / (1600 / 1280) ** 2 - 1).max() < 0.05


def test_routing_pictures_show_the_stages(client, shared):
    id = upload(client, file_of(np.full((512, 512, 3), 255, np.uint8)))
    share = []
    for stage in range(4):
        picture = client.get(f"/api/photos/{id}/routing", params={"keep_ratio": 0.25, "stage": stage}).content
        share.append((np.asarray(Image.open(io.BytesIO(picture)).convert("L")) > 160).mean())
    assert np.allclose(share, 0.25, atol=0.02)
    assert client.get(f"/api/photos/{id}/routing", params={"keep_ratio": 0.25, "stage": 4}).status_code == 400
    exact = TestClient(api(Segmenter(sam_model_registry["vit_t"](shipped_checkpoint("vit_t")))))
    id = upload(exact, file_of(data.coffee()))
    assert "no routing" in exact.get(f"/api/photos/{id}/routing", params={"keep_ratio": 1}).json()["error"]


# --- what is refused -------------------------------------------------------------------------------------------------


def png_header(width, height):
    """A PNG that claims a size, and holds next to nothing."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = file_of(data.coffee(), "JPEG")
PNG = file_of(data.coffee())


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


def test_the_header_alone_refuses_a_bomb(monkeypatch):
    monkeypatch.setattr(photos, "read_image", lambda *_: pytest.fail("decoded"))
    with pytest.raises(Refused, match="megapixels"):
        open_photo(png_header(20_000, 20_000), 512)
    check_header(png_header(6_000, 6_000))


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

    alone = [answers(TestClient(api(Segmenter(sam))), visit)[0] for visit in visits]
    with TestClient(api(Segmenter(sam))) as client, ThreadPoolExecutor(10) as pool:
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


def test_what_is_kept_is_bounded(shared):
    one = shared.add(JPEG)
    shared.photos.limit = 3 * one.nbytes
    kept = [shared.add(file_of(np.roll(data.coffee(), i, 1), "JPEG")) for i in range(1, 9)]
    assert len(shared.photos) <= 3 and shared.photos.weight <= shared.photos.limit
    with pytest.raises(Refused, match="open it again"):
        shared.photo(one.id)
    shared.encodings.limit = 2 * shared.encode(kept[-1], 0.1).encoded.nbytes
    for ratio in (0.1, 0.2, 0.3, 0.4):
        shared.encode(kept[-1], ratio)
    assert len(shared.encodings) == 2 and shared.encodings.get((kept[-1].id, 0.4)) is not None


def test_the_cache_forgets_what_was_used_longest_ago():
    cache = BoundedCache(3)
    for key in "abc":
        cache.put(key, key, 1)
    assert cache.get("a") == "a"
    cache.put("d", "d", 1)
    assert cache.get("b") is None and cache.get("a") == "a" and cache.weight == 3
    cache.put("a", "A", 3)
    assert cache.get("a") == "A" and len(cache) == 1 and cache.weight == 3
    cache.put("e", "e", 9)
    assert cache.get("e") == "e" and len(cache) == 1


def test_more_than_can_wait_are_told_so(shared, monkeypatch):
    photo, gate = shared.add(JPEG), threading.Event()
    shared._model.submit(gate.wait)
    prompt = Prompt(((270.0, 60.0, 1),))
    with ThreadPoolExecutor(MAX_WAITING + 5) as pool:
        waiting = [pool.submit(shared.masks, photo, 0.25, prompt) for _ in range(MAX_WAITING + 5)]
        refused = []
        while len(refused) < 5:
            refused = [job for job in waiting if job.done()]
        gate.set()
    errors = [job.exception() for job in waiting if job.exception()]
    assert len(errors) == 5 and all(error.status == 503 and "try again" in str(error) for error in errors)


def test_keep_ratios_come_in_hundredths():
    assert checked_ratio("0.254") == 0.25 and checked_ratio(1) == 1


# --- the page and the command ----------------------------------------------------------------------------------------


def test_the_page_is_built_without_a_look_at_the_network(shared, monkeypatch):
    from blsam.demo import page

    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: pytest.fail(f"asked for {host}"))
    client = TestClient(page.build_app(shared, "blsam_vit_t", 0.25))
    answer = client.get("/")
    assert answer.status_code == 200 and "canvas/app.js" in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert client.get("/canvas/app.js").status_code == 200
    assert Image.open(io.BytesIO(client.get("/api/examples/coffee.jpg").content)).size == (600, 400)
    assert client.get("/api/examples/none.jpg").status_code == 404
    files = {"files": ("a.txt", b"x" * 1000)}  # Gradio's own door is shut
    assert client.post("/gradio_api/upload", files=files).status_code == 413


def test_the_command_says_what_is_wrong(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err
    assert main(["demo", "--model", "vit_b"]) == 2 and "no weights ship" in capsys.readouterr().err
    assert main(["demo", "--keep-ratio", "0"]) == 2 and "keep ratio" in capsys.readouterr().err
    import blsam.demo

    monkeypatch.delattr(blsam.demo, "page", raising=False)
    monkeypatch.setitem(sys.modules, "blsam.demo.page", None)  # as where gradio is not installed
    assert main(["demo"]) == 2 and "pip install -e '.[demo]'" in capsys.readouterr().err
