"""Guessing the next tokens, so that one step of the model can confirm several. Torch-free; the walk is in execution."""
