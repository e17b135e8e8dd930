"""Order and admission for batches that are known as a whole. Pure functions; no torch, no files, no HTTP."""
