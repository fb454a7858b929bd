"""Distillation: a smaller model that learns from a larger one, from its logits or its text."""
