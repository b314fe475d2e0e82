"""The processes of a run: that all of them came and agree, and that they end together.

`table.py` is what they tell each other through.
`failure.py` ends all of them when one ends, each with the first cause as its last words.
`watchdog.py` ends them when no step is finished any more.
`exits.py` has the exit codes, and what is said of an error.
"""
