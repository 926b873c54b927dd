"""napari-segment-anything: its panel without a window; a click, a box with the mask before, everything."""

import numpy as np

PACKAGE = "napari-segment-anything"


def run(photo, checkpoint, folder):
    from napari.components import ViewerModel
    from napari_segment_anything import _widget
    from qtpy.QtWidgets import QApplication

    class Viewer(ViewerModel):
        def add_labels(self, *args, color=None, **kwargs):  # napari has no `color` there any more
            return super().add_labels(*args, **kwargs)

    application = QApplication.instance() or QApplication([])
    _widget.get_weights_path = lambda kind: checkpoint  # it would fetch SAM's
    viewer = Viewer()
    layer = viewer.add_image(photo, rgb=True)
    panel = _widget.SAMWidget(viewer, model_type="vit_b")
    panel._im_layer_widget.choices = [layer]
    panel._load_image(layer)
    masks = []
    viewer.layers["SAM points"].add([[110, 220]])
    masks.append(viewer.layers["SAM mask"].data > 0)
    viewer.layers["SAM box"].add_rectangles([[20, 120], [280, 300]])
    panel._on_interactive_run()
    masks.append(viewer.layers["SAM mask"].data > 0)
    panel._on_confirm_mask()
    generator = _widget.SamAutomaticMaskGenerator
    _widget.SamAutomaticMaskGenerator = lambda sam: generator(sam, 6, pred_iou_thresh=0.6, stability_score_thresh=0.7)
    panel._on_auto_run()
    application.processEvents()
    return {"labels": viewer.layers["SAM labels"].data.astype(np.int32), "masks": np.stack(masks)}
