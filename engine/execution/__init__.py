"""Data plane: turns a StepPlan into tensors, runs the model, chooses tokens. Knows slots and lengths, no requests."""
