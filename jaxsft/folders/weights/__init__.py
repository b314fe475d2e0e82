"""Weights between files and meshes, to the byte.

`layout.py` reads the tables of `model/families/`: which tensors are which weights; `stored.py` says what a folder holds
(`mxfp4.py` reads weights of four bits), `load.py` puts it on a mesh, `save.py` writes it back, `copying.py` is how
fast.
"""
