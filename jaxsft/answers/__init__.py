"""A model is asked.

In: a model on a mesh, or its folder. Out: answers (`generate.py`), the held-out loss and how many answers are right
(`evaluate.py`), a conversation in the terminal (`converse.py`).
"""
