"""The processes of a run: that all of them came and agree, and that they end together.

`table.py` is what they tell each other through, and `exchange.py` how all of them get what all have told.
`sealing.py` seals and looks at folders together.
"""
