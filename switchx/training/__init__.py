"""Losses, optimizers, metrics, state, checkpoints and the loop."""
