"""From a run to a bundle: graphs, INT8, half precision, plans, and the verdict on them."""

if __name__ == "export":  # by the folder's own name, from the root of a checkout
    from engineworks.folders import same

    same(__name__)
