"""Answering from a memory: entropy-driven top-down retrieval, and flat retrieval beside it."""
