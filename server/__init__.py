"""The HTTP front end: OpenAI-compatible routes over `engine.client`. Knows no tensors and no scheduling."""
