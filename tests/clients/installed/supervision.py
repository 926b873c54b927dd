"""supervision: the records of everything in a photo as detections, filtered and drawn."""

PACKAGE = "supervision"


def run(photo, checkpoint, folder):
    import supervision as sv
    from segment_anything import SamAutomaticMaskGenerator, sam_model_registry

    sam = sam_model_registry["vit_h"](checkpoint=checkpoint).to(device="cpu")
    generator = SamAutomaticMaskGenerator(
        sam, points_per_side=8, pred_iou_thresh=0.6, stability_score_thresh=0.7, crop_n_layers=1
    )
    found = sv.Detections.from_sam(sam_result=generator.generate(photo))
    found = found[found.area > 500]
    drawn = sv.MaskAnnotator(color_lookup=sv.ColorLookup.INDEX).annotate(scene=photo.copy(), detections=found)
    return {"boxes": found.xyxy, "drawn": drawn, "masks": found.mask}
