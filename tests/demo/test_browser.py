"""The demo in a browser: headless Chromium on a server of its own, which finds its port."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools
from skimage import data

from tests.helpers import ROOT

pytestmark = pytest.mark.e2e
CHROMIUM = shutil.which("chromium")
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'blsam[demo]'")
    command = [sys.executable, "-m", "blsam", "demo", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = server.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:\d+", line)
        assert found, f"the server said {line!r}"
        yield found[0]
        assert server.poll() is None, "the server died"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens visits: visit(size, ...) -> a page; at the end nothing was asked of another host, and no script failed."""
    contexts, elsewhere, errors = [], [], []

    def new(size=DESKTOP, **options):
        contexts.append(browser.new_context(viewport=size, **options))
        page = contexts[-1].new_page()
        here = (address, "data:", "blob:" + address)
        page.on("request", lambda request: request.url.startswith(here) or elsewhere.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(30_000)
        page.goto(address)
        page.wait_for_function("document.querySelector('#examples img')?.naturalWidth > 0")
        return page

    yield new
    for context in contexts:
        context.close()
    assert not elsewhere, f"asked of other machines: {elsewhere}"
    assert not errors


def says(page, text):
    page.wait_for_function("text => document.getElementById('status').textContent.includes(text)", arg=text)


def take(page, example):
    page.click(f"#examples button:has-text('{example}')")
    says(page, "ready")


def click(page, x, y, **options):
    """A click at a share of the photo's width and height; waits for the masks."""
    box = page.locator("#photo").bounding_box()
    page.evaluate("document.getElementById('status').textContent = ''")
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"], **options)
    says(page, "Three candidates")


def drag(page, x1, y1, x2, y2):
    box = page.locator("#photo").bounding_box()
    page.evaluate("document.getElementById('status').textContent = ''")
    page.mouse.move(box["x"] + x1 * box["width"], box["y"] + y1 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + x2 * box["width"], box["y"] + y2 * box["height"], steps=4)
    page.mouse.up()
    says(page, "Three candidates")


def shown(page):
    """What the canvas shows, uint8 [h, w, 3]."""
    page.wait_for_function("document.getElementById('busy').hidden")
    url = page.evaluate("document.getElementById('photo').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).astype(int)


def difference(a, b):
    """Share of the pixels that differ visibly."""
    return (np.abs(a - b).max(-1) > 12).mean()


def prompts(page):
    return page.evaluate("window.blsam.now")


def download(page, label):
    with page.expect_download() as waiting:
        page.click(f".downloads button:has-text('{label}')")
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def test_from_a_photo_to_files(visit, tmp_path):
    page = visit()
    photo = tmp_path / "my coffee.png"
    Image.fromarray(data.coffee()).save(photo)
    page.set_input_files("#file", photo)
    says(page, "600 x 400 pixels, ready")
    empty = shown(page)
    assert np.abs(empty - data.coffee()).mean() < 4, "the canvas does not show the photo"

    click(page, 0.45, 0.3)
    one = shown(page)
    assert difference(one, empty) > 0.01
    click(page, 0.35, 0.85, button="right")
    assert [point[2] for point in prompts(page)["points"]] == [1, 0]
    drag(page, 160 / 600, 10 / 400, 400 / 600, 245 / 400)
    boxed = shown(page)
    assert prompts(page)["points"] == [] and np.allclose(prompts(page)["box"], [160, 10, 400, 245], atol=2)
    blue = (boxed[..., 2] - empty[..., 2])[30:220, 180:380]
    assert (blue > 20).mean() > 0.4, "the cup in the box is not blue"

    page.click("#candidates button >> nth=0")
    page.wait_for_function("blsam.masks[0].overlay && blsam.canvas.view.overlay === blsam.masks[0].overlay")
    other = shown(page)
    page.keyboard.press("2")
    assert page.get_attribute("#candidates button >> nth=1", "aria-checked") in ("true", "false")
    page.focus("#photo")
    page.keyboard.press("2")
    assert page.get_attribute("#candidates button >> nth=1", "aria-checked") == "true"
    page.wait_for_function("blsam.masks[1].overlay && blsam.canvas.view.overlay === blsam.masks[1].overlay")
    assert difference(shown(page), other) > 0

    name, contents = download(page, "Mask")
    mask = np.asarray(Image.open(io.BytesIO(contents)))
    assert name == "my coffee_mask.png" and mask.shape == (400, 600)
    name, contents = download(page, "Cut-out")
    cut = np.asarray(Image.open(io.BytesIO(contents)))
    assert np.array_equal(cut[..., 3], mask) and np.array_equal(cut[..., :3], data.coffee())
    name, contents = download(page, "COCO")
    record = json.loads(contents)
    assert record["images"][0]["file_name"] == "my coffee.png"
    assert np.array_equal(rle_tools.decode(record["annotations"][0]["segmentation"]), mask // 255)

    page.click("#undo")
    says(page, "Three candidates")
    assert len(prompts(page)["points"]) == 2 and prompts(page)["box"] is None
    page.click("#undo")
    page.wait_for_function("window.blsam.now.points.length === 1 && !window.blsam.running")
    assert difference(shown(page), one) < 1e-3, "undo does not bring the earlier mask back"
    page.click("#clear")
    says(page, "Click an object")
    assert difference(shown(page), empty) < 1e-3
    page.click("#undo")
    says(page, "Three candidates")
    assert difference(shown(page), one) < 1e-3, "undo of clear"


def test_keep_ratio_routing_and_everything(visit):
    page = visit()
    take(page, "astronaut")
    photo = shown(page)
    page.select_option("#routing", "1")
    says(page, "went through the wide blocks")
    dark = (shown(page).mean(-1) < 0.5 * photo.mean(-1)).mean()
    assert 0.6 < dark < 0.85, f"{dark:.2f} of the photo is dark where a quarter should be prime"
    page.focus("#keep")
    page.keyboard.press("End")
    says(page, "Keep ratio 1.00: the encoder took")
    assert difference(shown(page), photo) < 0.02, "at keep ratio 1 every token is prime"
    rows = page.inner_text("#times").split("\n")
    assert rows[0] == "0.25" and rows[2] == "1.00" and all(re.fullmatch(r"\d+ ms", time) for time in rows[1::2])
    page.select_option("#routing", "")
    page.click("#everything")
    page.wait_for_function("window.blsam.view === 'everything'", timeout=120_000)
    count = int(page.inner_text("#status").split()[0])
    assert count > 5 and difference(shown(page), photo) > 0.2
    assert page.is_disabled(".downloads button:has-text('Mask')")
    name, contents = download(page, "COCO")
    assert name == "astronaut_everything.json" and len(json.loads(contents)["annotations"]) == count
    click(page, 0.4, 0.5)
    assert page.evaluate("window.blsam.view") == "prompt"


def test_keyboard_alone(visit):
    page = visit()
    page.focus("#examples button >> nth=1")
    page.keyboard.press("Enter")
    says(page, "ready")
    assert page.evaluate("document.activeElement.id") == "photo"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    says(page, "Three candidates")
    x, y, label = prompts(page)["points"][0]
    assert (x, y, label) == (256 - 512 / 40, 256, 1)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("r")
    page.wait_for_function("window.blsam.now.points.length === 2")
    assert prompts(page)["points"][1][2] == 0
    page.keyboard.press("Escape")
    says(page, "Click an object")
    page.keyboard.press("b")
    for key in ("ArrowRight", "ArrowUp") * 6:
        page.keyboard.press(key)
    page.keyboard.press("b")
    says(page, "Three candidates")
    left, top, right, bottom = prompts(page)["box"]
    assert right - left == pytest.approx(6 * 512 / 40) == pytest.approx(bottom - top)
    page.keyboard.press("z")
    page.wait_for_function("!window.blsam.now.box")


def test_two_visitors_keep_to_themselves(visit):
    one, two = visit(), visit()
    take(one, "coffee")
    take(two, "rocket")
    two.focus("#keep")
    two.keyboard.press("End")
    says(two, "Keep ratio 1.00")
    click(one, 0.45, 0.3)
    before = shown(one)
    click(two, 0.5, 0.5)
    click(two, 0.7, 0.4)
    assert len(prompts(one)["points"]) == 1 and len(prompts(two)["points"]) == 2
    assert one.inner_text("#keep-value") == "0.25" and two.inner_text("#keep-value") == "1.00"
    assert difference(shown(one), before) == 0 and shown(two).shape != before.shape
    one.click("#clear")
    says(one, "Click an object")
    click(one, 0.45, 0.3)
    assert difference(shown(one), before) < 1e-3, "the other visitor changed this one's mask"


def test_clicks_in_quick_succession_end_in_one_answer(visit):
    page = visit()
    take(page, "coffee")
    box = page.locator("#photo").bounding_box()
    for i in range(12):
        page.mouse.click(box["x"] + (0.35 + 0.02 * i) * box["width"], box["y"] + 0.4 * box["height"])
    page.wait_for_function("window.blsam.now.points.length === 12 && !window.blsam.running")
    quick = shown(page)
    page.keyboard.press("z")
    page.wait_for_function("window.blsam.now.points.length === 11 && !window.blsam.running")
    click(page, 0.35 + 0.02 * 11, 0.4)
    assert difference(shown(page), quick) < 1e-3, "the last mask does not belong to the last prompt"


def test_bad_files_leave_a_message_and_a_page_that_works(visit, tmp_path):
    page = visit()
    text = tmp_path / "holiday.jpg"
    text.write_text("no photo at all")
    page.set_input_files("#file", text)
    says(page, "no photo that can be read")
    assert "error" in page.get_attribute("#status", "class") and page.is_visible("#welcome")
    whole = io.BytesIO()
    Image.fromarray(data.coffee()).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:9000])
    page.set_input_files("#file", tmp_path / "cut.jpg")
    says(page, "damaged")
    (tmp_path / "huge.jpg").write_bytes(bytes(31 * 2**20))
    page.set_input_files("#file", tmp_path / "huge.jpg")
    says(page, "larger than 30 MB")
    Image.fromarray(data.coffee()[..., 0].astype(np.uint16) * 16).save(tmp_path / "deep.png")
    page.set_input_files("#file", tmp_path / "deep.png")  # which is read, and said how
    says(page, "600 x 400 pixels (values from 0 to 4080 are shown as 0 to 255), ready")
    page.click("#another")
    take(page, "cat")
    click(page, 0.5, 0.5)


def test_on_a_phone(visit):
    page = visit(PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    take(page, "coffee")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "the page scrolls sideways"
    canvas = page.locator("#photo").bounding_box()
    assert canvas["width"] > 0.85 * PHONE["width"]
    empty = shown(page)
    page.touchscreen.tap(canvas["x"] + 0.45 * canvas["width"], canvas["y"] + 0.3 * canvas["height"])
    says(page, "Three candidates")
    assert difference(shown(page), empty) > 0.01
    page.tap(".segmented .remove")
    page.touchscreen.tap(canvas["x"] + 0.35 * canvas["width"], canvas["y"] + 0.85 * canvas["height"])
    page.wait_for_function("window.blsam.now.points.length === 2")
    assert prompts(page)["points"][1][2] == 0
    for button in ("#undo", "#clear", "#everything"):
        assert page.locator(button).bounding_box()["height"] >= 44
