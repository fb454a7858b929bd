"""KV caches behind one protocol: full, quantized, windowed, evicting, paged, latent."""
