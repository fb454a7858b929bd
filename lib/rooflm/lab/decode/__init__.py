"""Decoding: how tokens are drawn, drafted, verified, and given up on early."""
