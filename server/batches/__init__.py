"""Batches of requests, online and offline."""
