"""Theory: roofline models of language-model inference, on the standard library alone."""
