"""Other people's token reduction inside SAM's image encoder, for comparison with bLSAM: on the same weights and data.

`config.REDUCED` are the models; `sam_model_registry` builds them.
"""
