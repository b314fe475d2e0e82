"""Weights between files and meshes, to the byte.

In: a folder's tensors, and the tables of `model/families/` that say which tensor is which weight. Out: parameters on a
mesh; and back.

To read: `layout.py` joins the two; `stored.py` says what a folder holds (`mxfp4.py` reads weights of four bits),
`check.py` compares it with what the model needs, `load.py` puts it on a mesh and `save.py` writes it back, tensor by
tensor as `together.py` gathers them, through a thread (`beside.py`); `copying.py` casts and transposes fast.
"""
