"""Seeded text generators that Mimir is trained and measured on. Nothing in this package imports torch."""
