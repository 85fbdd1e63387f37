"""Latent diffusion: t = 1 is noise, t = 0 is data, and a model predicts the velocity dx/dt."""
