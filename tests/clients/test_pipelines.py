"""ComfyUI-Impact-Pack, Grounded-SAM, autodistill, supervision: boxes of a detector in, masks out."""

import os
import subprocess
import sys

import numpy as np
import torch

from tests.clients.conftest import SIZE
from tests.helpers import ROOT
from tests.photos import PHOTOS

PHOTO = PHOTOS["landscape"]
BOXES = [[120.0, 20.0, 300.0, 280.0], [300.0, 30.0, 420.0, 200.0]]


def test_comfyui_hangs_attributes_on_the_model(sides):
    def program(side):
        sam = side.build()
        sam.is_auto_mode, sam.safe_to = True, lambda device: sam.to(device)
        sam.safe_to("cpu")
        predictor = side.api.SamPredictor(sam)
        predictor.set_image(PHOTO, "RGB")
        points, labels = np.array([[220, 110], [20, 20]]), np.array([1, 0])
        with_box = predictor.predict(point_coords=points, point_labels=labels, box=np.array(BOXES[0]))
        return with_box, predictor.predict(point_coords=None, point_labels=None, box=np.array(BOXES[1]))

    sides.compare(program)


def test_grounded_sam(sides):
    def program(side):
        predictor = side.predictor(PHOTO)
        boxes = predictor.transform.apply_boxes_torch(torch.tensor(BOXES), PHOTO.shape[:2]).to("cpu")
        masks, scores, logits = predictor.predict_torch(
            point_coords=None, point_labels=None, boxes=boxes, multimask_output=False
        )
        return masks, scores, logits, masks[0].cpu().numpy()[0]

    sides.compare(program)


def test_a_detector_that_found_nothing(sides):
    """`segment_anything` fails in a reshape of nothing; a program that does not look gets an empty result from ours."""
    predictor = sides.ours.predictor(PHOTO)
    boxes = predictor.transform.apply_boxes_torch(torch.zeros(0, 4), PHOTO.shape[:2])
    for multimask, count in ((False, 1), (True, 3)):
        masks, scores, logits = predictor.predict_torch(None, None, boxes, multimask_output=multimask)
        assert masks.shape == (0, count, *PHOTO.shape[:2]) and masks.dtype == torch.bool
        assert scores.shape == (0, count) and logits.shape == (0, count, SIZE // 4, SIZE // 4)


def test_no_prompt_at_all(sides):
    sides.compare(lambda side: side.predictor(PHOTO).predict_torch(point_coords=None, point_labels=None, boxes=None))


def test_autodistill_asks_for_every_box(sides):
    def program(side):
        sam = side.api.sam_model_registry[side.model_type](checkpoint=side.checkpoint).to(device="cpu")
        predictor = side.api.SamPredictor(sam)
        predictor.set_image(PHOTO)
        found = []
        for box in np.array(BOXES, np.float32):
            masks, scores, _ = predictor.predict(box=box, multimask_output=False)
            found.append(masks[np.argmax(scores)])
        return np.array(found)

    sides.compare(program)


def test_supervision_reads_records(sides):
    def program(side):
        records = side.api.SamAutomaticMaskGenerator(
            side.build(), points_per_side=4, pred_iou_thresh=0.5, stability_score_thresh=0.6
        ).generate(PHOTO)
        records = sorted(records, key=lambda record: record["area"], reverse=True)
        corners = np.array([record["bbox"] for record in records[:2]])
        return records, corners, np.stack([record["segmentation"] for record in records[:2]])

    sides.compare(program)


FORK = {
    "__init__.py": "from .build_sam import sam_model_registry, sam_hq_model_registry\n"
    "from .predictor import SamPredictor\n"
    "from .automatic_mask_generator import SamAutomaticMaskGenerator\n",
    "build_sam.py": "sam_model_registry = sam_hq_model_registry = {}\n",
    "predictor.py": "class SamPredictor:\n    def predict(self, hq_token_only=False):\n        pass\n",
    "automatic_mask_generator.py": "class SamAutomaticMaskGenerator:\n    pass\n",
    "modeling/__init__.py": "from .image_encoder import ImageEncoderViT\n"
    "class Sam:\n    pass\nclass MaskDecoderHQ:\n    pass\nclass PromptEncoder:\n    pass\n"
    "class MaskDecoder:\n    pass\nclass TwoWayTransformer:\n    pass\n",
    "modeling/image_encoder.py": "class ImageEncoderViT:\n    pass\nclass PatchEmbed:\n    pass\n",
    "modeling/common.py": "class LayerNorm2d:\n    pass\nclass MLPBlock:\n    pass\n",
    "utils/__init__.py": "",
    "utils/transforms.py": "class ResizeLongestSide:\n    pass\n",
    "utils/amg.py": "",
}


def test_a_fork_under_the_name_of_segment_anything_is_refused(tmp_path):
    """Grounded-SAM brings the HQ fork, whose encoder gives two values, as a package of the same name."""
    for name, text in FORK.items():
        path = tmp_path / "segment_anything" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", "import blsam; blsam.SamPredictor"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and last.startswith("ImportError") and "segment_anything" in last, done.stderr[-500:]
    assert "pip install" in last, last  # the cure
