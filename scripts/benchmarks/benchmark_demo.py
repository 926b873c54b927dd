"""From a click to a mask on the page of `blsam demo`: decoder and upscaling, the HTTP request, the browser.

    python -m scripts.benchmarks.benchmark_demo                         # scikit-image's coffee cup, the model that ships
    python -m scripts.benchmarks.benchmark_demo --photo street.jpg --clicks 100 --model vit_t

The server runs in a process of its own. The browser is headless Chromium through Playwright; its time goes from the click
to the first frame after the mask was drawn. Without Chromium (--chromium PATH) its row is left out.
"""

import http.client
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from blsam.options import Parser, add_option, exit_status

WARM_UP = 5
CLICK = """async ([x, y]) => {
  const start = performance.now();
  await window.blsam.prompt({ points: [[x, y, 1]], box: null });
  await new Promise(requestAnimationFrame);
  return (performance.now() - start) / 1e3;
}"""


@contextmanager
def served(model: str, keep_ratio: float) -> Iterator[str]:
    """The page in a process of its own: HOST:PORT."""
    command = [sys.executable, "-m", "blsam", "demo", "--port", "0", "--model", model]
    server = subprocess.Popen(
        [*command, "--keep-ratio", str(keep_ratio)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        found = re.match(r"http://(\S+)", server.stdout.readline())
        if not found:
            raise ValueError("the server did not start: see above")
        yield found[1]
    finally:
        server.terminate()
        server.wait()


def over_http(host: str, photo: bytes, clicks: np.ndarray, keep_ratio: float) -> dict[str, list[float]]:
    """Seconds of every click: decoder and upscaling, the server's whole work, and the request as the client sees it."""
    connection = http.client.HTTPConnection(host)

    def post(path: str, body: bytes) -> dict:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise ValueError(f"{path}: {text.decode()}")
        return json.loads(text)

    id = post("/api/photos", photo)["id"]
    post(f"/api/photos/{id}/encode", json.dumps({"keep_ratio": keep_ratio}).encode())
    rows: dict[str, list[float]] = {"decoder and upscaling": [], "all in the server": [], "HTTP request": []}
    for x, y in clicks:
        body = json.dumps({"points": [[x, y, 1]], "keep_ratio": keep_ratio}).encode()
        start = time.perf_counter()
        seconds = post(f"/api/photos/{id}/masks", body)["seconds"]
        rows["HTTP request"].append(time.perf_counter() - start)
        rows["decoder and upscaling"].append(seconds["decoder"])
        rows["all in the server"].append(seconds["request"])
    return rows


def in_browser(host: str, photo: bytes, clicks: np.ndarray, chromium: str) -> list[float]:
    """Seconds of every click in the page, until the frame after the mask."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto(f"http://{host}")
        page.wait_for_selector("#examples img")
        page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": photo})
        page.wait_for_function("document.getElementById('status').textContent.includes('ready')")
        seconds = [page.evaluate(CLICK, [float(x), float(y)]) for x, y in clicks]
        browser.close()
    return seconds


def main() -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--photo", type=Path)
    add_option(parser, "--model")
    add_option(parser, "--keep-ratio")
    add("--clicks", type=int, default=60)
    add("--chromium", default=shutil.which("chromium"))
    args = parser.parse_args()
    if args.photo:
        photo = args.photo.read_bytes()
    else:
        buffer = io.BytesIO()
        Image.fromarray(data.coffee()).save(buffer, "PNG")
        photo = buffer.getvalue()
    width, height = Image.open(io.BytesIO(photo)).size
    clicks = np.random.default_rng(0).uniform((0, 0), (width, height), (args.clicks + WARM_UP, 2)).round(1)

    with served(args.model, args.keep_ratio) as host:
        rows = over_http(host, photo, clicks, args.keep_ratio)
        if args.chromium:
            rows["browser, click to frame"] = in_browser(host, photo, clicks, args.chromium)
    print(f"{args.model}, {width} x {height}, {args.clicks} clicks; ms")
    print(f"{'':<26}{'median':>8}{'p95':>8}")
    for name, seconds in rows.items():
        median, high = np.quantile(seconds[WARM_UP:], (0.5, 0.95)) * 1e3
        print(f"{name:<26}{median:>8.1f}{high:>8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("benchmark_demo", main))
