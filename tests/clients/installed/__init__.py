"""Programs from PyPI at their main job, on `segment_anything` and on ours: `make test-clients`.

A module here is one program: `PACKAGE`, what PyPI calls it, and `run(photo, checkpoint, folder)`, which does with
photo uint8 [H, W, 3] what its users do, and returns arrays; "masks" bool [N, H, W] is what pictures show. `checkpoint`
is a file as SAM's, which the program finds under the names of SAM's models. `folder` is empty, to write to. `IMAGE_SIZE`
is there where the program takes SAM's 1024 for granted.
"""
