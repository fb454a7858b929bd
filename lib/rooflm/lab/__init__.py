"""Practice: the techniques of the book in torch, at small scale, one module per technique."""
