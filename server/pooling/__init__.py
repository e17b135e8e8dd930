"""Embeddings, pooling, classes, scores and reranking."""
