"""`make gpu`: checks every kernel on the GPU, measures kernels and engine against their limits, writes JSON."""
