"""napari-sam: its panel without a window; a volume encoded slice by slice, clicks and boxes in slices, everything."""

import numpy as np

PACKAGE = "napari-sam"
AUTO = {"points_per_side": 6, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.4}


def run(photo, checkpoint, folder):
    from napari.components import ViewerModel
    from napari_sam import _widget
    from qtpy.QtWidgets import QApplication

    application = QApplication.instance() or QApplication([])
    _widget.SamWidget.get_weights_path = lambda self, kind: checkpoint  # it would fetch SAM's
    _widget.SamWidget.get_cached_weight_types = lambda self, kinds: dict.fromkeys(kinds, True)
    _widget.SamWidget.init_comboboxes = lambda self: None  # which asks for an event that napari has no longer
    viewer = ViewerModel()
    volume = np.stack([photo[..., 0], photo[::-1, :, 1]])
    layers = viewer.add_image(volume), viewer.add_labels(np.zeros(volume.shape, np.int32))
    panel = _widget.SamWidget(viewer)
    panel._load_model()
    panel.image_layer, panel.label_layer = layers
    panel.set_image()
    panel.sam_logits = [None] * len(volume)
    click = panel.predict_sam([np.array([0, 110, 220])], [1], None, x_coord=0)
    corners = np.array([[1, 280, 120], [1, 280, 300], [1, 20, 300], [1, 20, 120]])
    box = panel.predict_sam(None, None, corners, x_coord=1)
    panel.check_prev_mask.setChecked(True)
    again = panel.predict_sam([np.array([0, 110, 220]), np.array([0, 20, 20])], [1, 0], None, x_coord=0)
    panel.sam_anything_predictor = _widget.SamAutomaticMaskGenerator(panel.sam_model, **AUTO)
    everything = panel.predict_everything()
    application.processEvents()
    features = np.stack([one.numpy() for one in panel.sam_features])
    masks = np.stack([click[0], again[0]]) > 0
    return {"features": features, "box": box, "everything": everything.astype(np.int32), "masks": masks}
