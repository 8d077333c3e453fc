"""Both bounds of the Semantic Information Bottleneck against enumeration."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.sib import objective

RNG = np.random.default_rng(0)


def test_relevance_is_the_entropy_of_the_answer_plus_what_the_reader_knows():
    log_p, weight = np.log(RNG.uniform(0.1, 1, (3, 4))), RNG.random((3, 4)) < 0.6
    expected = np.log(4) + log_p[weight].mean()
    out = objective.relevance_bound(jnp.asarray(log_p), np.log(4), jnp.asarray(weight))
    assert float(out) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("p", "expected"), [(1.0, np.log(5)), (0.2, 0.0)])
def test_relevance_of_knowing_all_and_of_guessing(p, expected):
    log_p = jnp.full((7,), np.log(p))
    out = objective.relevance_bound(log_p, np.log(5), jnp.ones(7))
    assert float(out) == pytest.approx(expected, abs=1e-6)


def test_relevance_takes_an_entropy_for_every_stream():
    log_p, entropy = np.log(RNG.uniform(0.1, 1, (3, 4))), np.log([[2.0], [5.0], [9.0]])
    weight = np.broadcast_to([[1], [0], [1]], (3, 4))
    expected = (log_p[[0, 2]] + entropy[[0, 2]]).mean()
    out = objective.relevance_bound(jnp.asarray(log_p), jnp.asarray(entropy), jnp.asarray(weight))
    assert float(out) == pytest.approx(expected, rel=1e-5)


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
                jnp.log(q.reshape(-1)), np.log(4), jnp.asarray(channel.reshape(-1) / 6)
            )
            # log O stands for H(Y), which shuffled options make exact.
            slack = np.log(4) + np.sum(marginal * np.log(marginal))
            assert float(bound) - slack <= information + 1e-5


# Four memories: their lengths, and how often two policies make them (in tenths).
TOKENS = np.array([0.0, 10.0, 20.0, 40.0])
REF, PI = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])


def drawn(shares, pi=PI, ref=REF):
    """Ten draws in exactly the given shares."""
    counts = (10 * shares).round().astype(int)
    log_ratio = np.repeat(np.log(pi / ref), counts)
    return objective.Draws(jnp.asarray(log_ratio), jnp.asarray(np.repeat(TOKENS, counts)))


@pytest.mark.parametrize("lam", [0.0, 0.05, 2.0])
def test_log_partition(lam):
    log_z, counts = objective.log_partition(drawn(PI), drawn(REF), lam)
    expected = np.log(np.sum(REF * np.exp(-lam * TOKENS)))
    assert float(log_z) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < float(counts) <= 1 + 1e-6


def test_all_draws_count_where_nothing_tells_them_apart():
    same = objective.Draws(jnp.zeros(6), jnp.full(6, 3.0))
    log_z, counts = objective.log_partition(same, same, 0.1)
    assert float(counts) == pytest.approx(1.0, abs=1e-5)
    assert float(log_z) == pytest.approx(-0.3, rel=1e-5)


def test_log_partition_of_long_memories_does_not_underflow():
    long = objective.Draws(jnp.zeros(4), jnp.full((4,), 1e5))
    assert float(objective.log_partition(long, long, 0.1)[0]) == pytest.approx(-1e4, rel=1e-5)


def test_short_memories_that_the_reference_never_drew_keep_the_rate_a_bound():
    """Ten-chunk streams of which p_ref keeps each chunk with 1/2, pi with 1/50."""
    rng, lam, size = np.random.default_rng(1), 3.0, 64
    kept = [rng.binomial(10, p, size) for p in (0.02, 0.5)]
    pi, ref = (
        objective.Draws(
            jnp.asarray(k * np.log(0.02 / 0.5) + (10 - k) * np.log(0.98 / 0.5)),
            jnp.asarray(1.0 * k),
        )
        for k in kept
    )
    exact = 10 * np.log(0.5 + 0.5 * np.exp(-lam))
    log_z, counts = objective.log_partition(pi, ref, lam)
    assert float(log_z) == pytest.approx(exact, abs=0.1)
    assert float(counts) > 0.3
    keep = 0.5 * np.exp(-lam) / (0.5 + 0.5 * np.exp(-lam))  # of r
    divergence = 10 * (0.02 * np.log(0.02 / keep) + 0.98 * np.log(0.98 / (1 - keep)))
    assert float(objective.rate_bound(pi, log_z, lam)) == pytest.approx(divergence, abs=0.15)
    alone = -lam * np.float32(kept[1])
    assert np.log(np.mean(np.exp(alone))) < exact - 0.3  # what the reference alone would say


def test_rate_is_the_divergence_from_the_prior():
    """The expectation under pi of the terms is KL(pi || r), r of eq. 9."""
    lam = 0.05
    prior = REF * np.exp(-lam * TOKENS)
    log_z = np.log(prior.sum())
    divergence = np.sum(PI * np.log(PI / (prior / prior.sum())))
    out = objective.rate_bound(drawn(PI), jnp.asarray(log_z), lam)
    assert float(out) == pytest.approx(divergence, rel=1e-5)


def test_without_a_rate_the_prior_is_the_reference():
    out = objective.rate_bound(drawn(PI), jnp.asarray(0.0), 0.0)
    assert float(out) == pytest.approx(np.sum(PI * np.log(PI / REF)), rel=1e-5)
