"""The torch-free base: everything that runs a bundle. It imports none of the other packages."""

if __name__ == "runtime":  # by the folder's own name, from the root of a checkout
    from engineworks.folders import same

    same(__name__)
