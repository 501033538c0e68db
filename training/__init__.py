"""Nets, losses and the loop that train the systems: PyTorch's side, which no bundle needs."""

if __name__ == "training":  # by the folder's own name, from the root of a checkout
    from engineworks.folders import same

    same(__name__)
