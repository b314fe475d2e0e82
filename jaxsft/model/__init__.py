"""Tokens become hidden states.

In: tokens, segment ids and positions [B, T]. Out: the final norm's output [B, T, D], and the unembedding.

To read: `architecture.py` is what a decoder computes, as data; `decoder.py` computes it, of `embedding.py`,
`layers.py`, `rope.py`, `attention.py` and `experts.py` (`dispatch.py`); `remat.py` says what of a layer is kept.
Attention is computed by `tiles.py`, with `needed.py`, on one CPU and on devices that share rows, in the order of
`balance.py`; on TPUs by `splash.py` or `packed.py` (`pairs.py`, `packed_kernels.py`), of keys of whole rows
(`keys.py`), tried before a run by `kernel_check.py`. `abstract.py` is a decoder without its values; `families/` has a
file for each family of models, which reads its `config.json` by `fields.py` and `bounds.py`.
"""
