"""Runs side by side: metrics of ours and of other trainers as records, curves, one HTML page and its JSON twin."""
