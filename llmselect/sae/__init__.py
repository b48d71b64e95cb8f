"""Sparse autoencoders of hidden states: loading them, finding the layer they read, training them, describing latents."""
