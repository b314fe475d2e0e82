"""Examples become packed rows, and `batch(step)`.

In: sources of the config, an encoder. Out: `batch(step)`, a pure function of data, seed and step.

To read: `portions.py` encodes rows by the hundred (`lengths.py` cuts them, `workers.py` does it in several processes);
`prepare.py` keeps what comes out (`cache.py`, `bucket_cache.py`), `mixture.py` joins sources, `packing.py` plans rows,
`loader.py` makes batches of them; `stream.py` does all of it window by window while training goes on; `overlap.py`
looks for held-out rows among the trained ones.
"""
