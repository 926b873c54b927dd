"""samexporter, which writes what AnyLabeling runs: encoder and decoder as ONNX, then a point and a box."""

import numpy as np

PACKAGE, IMAGE_SIZE = "samexporter", 1024


def run(photo, checkpoint, folder):
    from samexporter import export_decoder, export_encoder
    from samexporter.sam_onnx import SegmentAnythingONNX

    paths = [str(folder / f"{name}.onnx") for name in ("encoder", "decoder")]
    export_encoder.run_export("vit_b", checkpoint, paths[0], use_preprocess=True, opset=17)
    export_decoder.run_export("vit_b", checkpoint, paths[1], opset=17, return_single_mask=True)
    model = SegmentAnythingONNX(*paths)
    encoded = model.encode(photo[..., ::-1])
    prompts = (
        [{"type": "point", "data": [220, 110], "label": 1}, {"type": "point", "data": [20, 20], "label": 0}],
        [{"type": "rectangle", "data": [390, 20, 465, 280]}],
    )
    masks = [model.predict_masks(encoded, prompt)[0, 0] > 0 for prompt in prompts]
    return {"features": encoded["image_embedding"], "masks": np.stack(masks)}
