"""Retrieval entropy by its definition, in float64 NumPy, and random banks to try it on."""

import numpy as np


def softmax(scores):
    """Rows of probabilities; of rows without a valid score (-inf), zeros."""
    p = np.exp(scores - np.where(np.isneginf(scores.max(-1)), 0, scores.max(-1))[:, None])
    return p / np.maximum(p.sum(-1), 1e-300)[:, None]


def scores(query, keys, mask, temperature):
    """float64 [B, N] logits, -inf where masked; a masked key may be anything."""
    query, keys = np.asarray(query, np.float64), np.asarray(keys, np.float64)
    valid = np.broadcast_to(True if mask is None else mask, (len(query), keys.shape[-2]))
    product = np.einsum("bd,bnd->bn", query, np.broadcast_to(keys, (len(query), *keys.shape[-2:])))
    return np.where(valid, product / temperature, -np.inf)


def retrieval_entropy(query, keys, mask, *, temperature, top_k):
    """log_z, entropy, top_values, top_indices."""
    s = scores(query, keys, mask, temperature)
    p = softmax(s)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    m = np.where(np.isneginf(s.max(-1)), 0, s.max(-1))
    with np.errstate(divide="ignore"):
        log_z = m + np.log(np.exp(s - m[:, None]).sum(-1))
    order = np.argsort(-s, axis=-1, kind="stable")[:, :top_k]
    top = np.take_along_axis(s, order, -1)
    order = np.where(np.isneginf(top), -1, order)
    pad = ((0, 0), (0, top_k - order.shape[-1]))
    return (
        log_z,
        entropy,
        np.pad(top, pad, constant_values=-np.inf),
        np.pad(order, pad, constant_values=-1),
    )


def bank(seed, num_queries, num_keys, dim, *, masked=True, own=False):
    """float32 query, keys (an own bank for each query if `own`) and a mask with a third gone."""
    rng = np.random.default_rng(seed)
    shape = (num_queries, num_keys) if own else (num_keys,)
    query = rng.normal(size=(num_queries, dim)).astype(np.float32)
    keys = rng.normal(size=(*shape, dim)).astype(np.float32)
    return query, keys, rng.random(shape) < 2 / 3 if masked else None
