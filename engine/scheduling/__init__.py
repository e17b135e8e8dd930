"""Control plane: who runs, how many tokens, which blocks. Integers only."""
