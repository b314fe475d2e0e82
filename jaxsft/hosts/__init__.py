"""The processes of a run: that all of them came and agree, and that they end together.

`start.py` is how they find each other, and who did not come.
`table.py` is what they tell each other through.
`logs.py` is what each of them says, in a file of its own.
`words.py` names some of many.
"""
