"""Programs that train as others do, each in a process of its own that imports nothing of ours that is ours to test."""
