"""Retrieval entropy over a bank of keys in one pass; see `api.retrieval_entropy`."""

from mmmem_jax.kernels.retrieval_entropy.api import retrieval_entropy as retrieval_entropy
