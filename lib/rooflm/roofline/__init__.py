"""Theory: roofline models of language-model inference, on the standard library alone."""

__version__ = "0.1.0"
