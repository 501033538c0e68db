"""The torch-free base: everything that runs a bundle. It imports none of the other packages."""
