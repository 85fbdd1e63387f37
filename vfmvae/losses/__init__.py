"""Losses as pure functions: tensors in, scalar out; the training loop does the backward pass."""
