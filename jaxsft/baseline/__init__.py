"""Programs that train as others do, for comparison: `hf.py` with transformers, `trl.py` with TRL.

In: a folder with a request. Out: the same folder, with what the program computed. Each is a process of its own and
imports nothing of jaxsft, so that a mistake of ours cannot be in both runs.
"""
