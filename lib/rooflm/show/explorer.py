"""The explorer of memory- and compute-bound operation (its interactive half follows)."""
