"""Load tests and benchmarks against any OpenAI-compatible endpoint; imports nothing of the engine's tensor code."""
