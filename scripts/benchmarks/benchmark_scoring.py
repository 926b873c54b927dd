"""Time and memory of reading annotations and scoring masks at the size of COCO val2017, on synthetic data.

    python -m scripts.benchmarks.benchmark_scoring          # 5,000 images, 36,781 annotations, 80 categories

Objects are polygons of 24 corners in 640 x 480, their areas spread as COCO's are; predictions are the true masks moved
by a few pixels. Making the data is not timed.
"""

import json
import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

from blsam.data.annotations import Annotations, to_rle
from blsam.evaluation.instance_ap import InstanceAP
from blsam.evaluation.prompted import PromptedIoU
from blsam.evaluation.protocols import PROTOCOLS
from blsam.evaluation.runner import read_part
from blsam.options import Parser, exit_status

HEIGHT, WIDTH = 480, 640


def write_synthetic(folder: Path, images: int, annotations: int) -> None:
    """annotations.json in COCO's format, part-0.jsonl as a run leaves it, and a file for every image to be found."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    rows, predicted = [], {i: [] for i in range(1, images + 1)}
    for number in range(1, annotations + 1):
        image = 1 + number % images
        radius = np.exp(rng.uniform(np.log(4), np.log(200)))
        centre = rng.uniform((0, 0), (WIDTH, HEIGHT))
        corners = centre + radius * rng.uniform(0.6, 1, (24, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        corners = corners.clip((0, 0), (WIDTH, HEIGHT))
        (x1, y1), (x2, y2) = corners.min(0), corners.max(0)
        if x2 - x1 < 2 or y2 - y1 < 2:
            corners = np.array([[0, 0], [9, 0], [9, 9], [0, 9]])
            x1, y1, x2, y2 = 0, 0, 9, 9
        rle = to_rle([corners.ravel().tolist()], HEIGHT, WIDTH)
        row = {"id": number, "image_id": image, "category_id": 1 + int(rng.integers(80)), "iscrowd": 0}
        row |= {"segmentation": [corners.ravel().tolist()], "area": float(rle_tools.area(rle))}
        rows.append(row | {"bbox": [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]})
        moved = (corners + rng.integers(-3, 4, 2)).clip((0, 0), (WIDTH, HEIGHT))
        counts = to_rle([moved.ravel().tolist()], HEIGHT, WIDTH)["counts"].decode()
        score = float(rng.random())
        predicted[image].append(
            {"id": number, "category_id": row["category_id"], "counts": counts, "score": score}
            | {"points": [[float(v) for v in centre.clip(0, (WIDTH - 1, HEIGHT - 1))] + [1]]}
        )
    photos = [{"id": i, "file_name": "x.jpg", "height": HEIGHT, "width": WIDTH} for i in predicted]
    categories = [{"id": i, "name": str(i)} for i in range(1, 81)]
    dataset = {"images": photos, "annotations": rows, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(dataset))
    lines = [json.dumps({"image_id": image, "rows": found}) + "\n" for image, found in predicted.items()]
    (folder / "part-0.jsonl").write_text("".join(lines))
    (folder / "x.jpg").touch()


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--annotations", type=int, default=36781)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own, so that its memory is not counted
        making = get_context("spawn").Process(target=write_synthetic, args=(folder, args.images, args.annotations))
        making.start()
        making.join()
        start = begin = time.perf_counter()
        annotations = Annotations(folder / "annotations.json", folder, "coco")
        lines = list(read_part(folder / "part-0.jsonl"))
        start = report("reading", start)
    points = PromptedIoU(annotations, PROTOCOLS["paper"], "point")
    for name, evaluator in (("mean IoU, points", points), ("average precision", InstanceAP(annotations))):
        for photo, line in zip(annotations.photos, lines):
            evaluator.process(photo, line["rows"])
        evaluator.evaluate()
        start = report(name, start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{'all':<20}{time.perf_counter() - begin:6.1f} s, peak memory {peak:.2f} GB")
    return 0


def report(name: str, start: float) -> float:
    now = time.perf_counter()
    print(f"{name:<20}{now - start:6.1f} s", flush=True)
    return now


if __name__ == "__main__":
    sys.exit(exit_status("benchmark_scoring", main))
