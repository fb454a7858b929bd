"""Quantizers: cores that are pure functions of tensors, and their application to a model."""
