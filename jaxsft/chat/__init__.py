"""Conversations become tokens, with a weight on each that the model must produce.

In: a `Conversation`, a tokenizer with its chat template. Out: an `Encoded`: the tokens that transformers' chat template
gives, and the weights of those that are the assistant's to produce; or a `MaskError` that says why there can be none.

To read: `encoder.py` is the way through. `template.py` renders with provenance (`provenance.py`, `metered.py`,
`probe.py`); `layout.py` and `likeness.py` say where in a text which message stands; `habits.py` and `stops.py` learn
once what a template does; `turns.py`, `starts.py`, `exchanges.py`, `thinking.py` and `parts.py` choose the characters
that are trained; `control.py` and `extents.py` make them tokens, `weighing.py` weighs these; `lost.py` and
`invariant.py` look again at what came out. Rows that are no conversations are `documents.py`'s.
`named_templates.py` and `templates/` are chat templates of ours, for models that have none.
"""
