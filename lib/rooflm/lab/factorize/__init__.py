"""Weights as products of thin matrices, and what that costs and saves.

Chapter: factorization.
"""
