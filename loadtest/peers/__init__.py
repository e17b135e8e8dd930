"""Opponents that serve the same weights on the same machine, each behind a context manager that yields a Target."""
