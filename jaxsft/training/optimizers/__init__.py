"""Optimizers: each turns gradients (already clipped) into directions of steepest ascent, by a state of its own.

In: the section `optim`, parameters and gradients as states of Variables with `axes`. Out: `Optimizer`s, whose
states are pytrees of Variables with the axes of the parameter, or with some of its letters, so that `mesh.shardings`
knows where each part of them lies.

To read: `params.py` says what a parameter is (its path, its matrices, its decay and its group), `moments.py` is AdamW,
Lion and SGD by optax, and `eight_bit.py`, `adafactor.py`, `muon.py` and `schedule_free.py` are one optimizer each.
`training/optim.py` has the table of all.
"""
