"""Ranges of activations, from pictures: what INT8 is quantized with."""

if __name__ == "calibration":  # by the folder's own name, from the root of a checkout
    from engineworks.folders import same

    same(__name__)
