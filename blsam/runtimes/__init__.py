"""Where the image encoder's pass is computed: in torch, or in a runtime of its own.

`choice` says which names there are and which one is the fastest here, `engine` hands passes over, `backends` knows
OpenVINO and ONNX Runtime, `cache` keeps what was compiled.
"""
