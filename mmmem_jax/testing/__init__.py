"""Toy streams and memories for tests and examples."""
