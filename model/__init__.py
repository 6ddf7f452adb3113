"""Stable Diffusion 3.5: MMDiT, text encoders, VAE, sampling. Knows no server."""
