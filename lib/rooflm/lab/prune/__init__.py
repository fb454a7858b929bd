"""Pruning: weights, heads, channels and layers that are removed, and what that costs."""
