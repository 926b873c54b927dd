"""The pictures of the model that ships in README and docs, made again: a mask, the routing, the page.

    python -m scripts.studies.make_pictures      # docs/cup.png, docs/routing.png, docs/demo.png

The page wants Chromium (--chromium PATH) and Playwright, as the tests of the demo do. The photo is scikit-image's.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from blsam import sam_model_registry
from blsam.cli import main as command_line
from blsam.files import write_atomically
from blsam.options import DEFAULT_MODEL, Parser, exit_status, find_checkpoint
from scripts.benchmarks.benchmark_demo import served
from scripts.visualize_routing import segmenter, write_figure

KEEP_RATIO, BOX = 0.25, (160, 10, 400, 245)
READY = "document.getElementById('status').textContent.includes('ready')"
MASKS = "document.getElementById('status').textContent.includes('Three candidates')"


def photograph_page(image: np.ndarray, path: Path, chromium: str) -> None:
    """The page after the box was drawn, with the times of four keep ratios beside the slider."""
    from playwright.sync_api import sync_playwright

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    photo = {"name": "coffee.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    with served(DEFAULT_MODEL, KEEP_RATIO) as host, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 840})
        page.goto(f"http://{host}")
        page.wait_for_selector("#examples img")
        page.set_input_files("#file", photo)
        page.wait_for_function(READY)
        for keep in (0.1, 0.5, 1.0, KEEP_RATIO):
            page.evaluate("keep => window.blsam.setKeep(keep)", keep)
        height, width = image.shape[:2]
        frame = page.locator("#photo").bounding_box()
        x1, y1, x2, y2 = (
            frame[corner] + frame[side] * value / length
            for value, corner, side, length in zip(BOX, "xyxy", ("width", "height") * 2, (width, height) * 2)
        )
        page.mouse.move(x1, y1)
        page.mouse.down()
        page.mouse.move(x2, y2, steps=4)
        page.mouse.up()
        page.wait_for_function(MASKS)
        page.mouse.move(5, 5)
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256)  # a third of the bytes
        browser.close()
    write_atomically(path, lambda temporary: shot.save(temporary, "PNG"))


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", default=Path("docs"))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    args = parser.parse_args()
    if not args.chromium:
        raise FileNotFoundError("no chromium: --chromium PATH, or Debian's apt-get install chromium")
    args.output.mkdir(parents=True, exist_ok=True)
    image = data.coffee()
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "coffee.png"
        Image.fromarray(image).save(photo)
        box = ",".join(map(str, BOX))
        if code := command_line(["segment", str(photo), "--box", box, "-o", str(args.output / "cup.png")]):
            return code
    sam = sam_model_registry[DEFAULT_MODEL](find_checkpoint(DEFAULT_MODEL, None), keep_ratio=KEEP_RATIO)
    write_figure(segmenter(sam)(image), args.output / "routing.png")
    photograph_page(image, args.output / "demo.png", args.chromium)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("make_pictures", main))
