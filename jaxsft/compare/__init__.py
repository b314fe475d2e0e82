"""The same run twice, ours and in PyTorch, side by side: what is exchanged with the two programs, and the checks."""
