"""Both bounds of the Semantic Information Bottleneck against enumeration."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.sib import objective

RNG = np.random.default_rng(0)


def test_relevance_is_the_entropy_of_the_answer_plus_what_the_reader_knows():
    log_p, weight = np.log(RNG.uniform(0.1, 1, (3, 4))), RNG.random((3, 4)) < 0.6
    expected = np.log(4) + log_p[weight].mean()
    out = objective.relevance_bound(jnp.asarray(log_p), 4, jnp.asarray(weight))
    assert float(out) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("p", "expected"), [(1.0, np.log(5)), (0.2, 0.0)])
def test_relevance_of_knowing_all_and_of_guessing(p, expected):
    log_p = jnp.full((7,), np.log(p))
    out = objective.relevance_bound(log_p, 5, jnp.ones(7))
    assert float(out) == pytest.approx(expected, abs=1e-6)


def test_relevance_never_passes_the_information_there_is():
    """Y from M through a noisy channel, any reader: the bound stays below I(M; Y)."""
    channel = RNG.dirichlet(np.ones(4), size=6)  # p(y | m), m uniform
    channel += np.eye(4)[np.arange(6) % 4]
    channel /= channel.sum(1, keepdims=True)
    for _ in range(20):
        reader = RNG.dirichlet(np.ones(4), size=6)
        for q in (reader, channel):
            marginal = channel.mean(0)
            information = np.mean(np.sum(channel * np.log(channel / marginal), 1))
            bound = objective.relevance_bound(
                jnp.log(q.reshape(-1)), 4, jnp.asarray(channel.reshape(-1) / 6)
            )
            # log O stands for H(Y), which shuffled options make exact.
            slack = np.log(4) + np.sum(marginal * np.log(marginal))
            assert float(bound) - slack <= information + 1e-5


@pytest.mark.parametrize("lam", [0.0, 0.01, 0.3])
def test_log_partition(lam):
    tokens = RNG.integers(0, 60, (8, 5)).astype(np.float32)
    expected = np.log(np.mean(np.exp(-lam * tokens.astype(np.float64))))
    out = objective.log_partition(jnp.asarray(tokens), lam)
    assert float(out) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_log_partition_of_long_memories_does_not_underflow():
    out = objective.log_partition(jnp.full((4,), 1e5), 0.1)
    assert float(out) == pytest.approx(-1e4, rel=1e-5)


def test_rate_is_the_divergence_from_the_prior():
    """Over four memories: the expectation under pi of the terms is KL(pi || r), r of eq. 9."""
    lam, tokens = 0.05, np.array([0.0, 10.0, 20.0, 40.0])
    ref, pi = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    prior = ref * np.exp(-lam * tokens)
    log_z = np.log(prior.sum())
    divergence = np.sum(pi * np.log(pi / (prior / prior.sum())))
    counts = (pi * 10).round().astype(int)  # ten draws in exactly those shares
    log_ratio = np.repeat(np.log(pi / ref), counts)
    out = objective.rate_bound(
        jnp.asarray(log_ratio), jnp.asarray(np.repeat(tokens, counts)), jnp.asarray(log_z), lam
    )
    assert float(out) == pytest.approx(divergence, rel=1e-5)
    drawn = np.repeat(tokens, (ref * 10).round().astype(int))
    assert float(objective.log_partition(jnp.asarray(drawn), lam)) == pytest.approx(log_z, rel=1e-5)
