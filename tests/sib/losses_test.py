"""The clipped loss against cases worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.sib import losses

# One stream, two generations, two units of two decisions.
OLD = np.log(np.array([[[0.5, 0.4, 0.2, 0.5], [0.5, 0.5, 0.5, 0.5]]]))
NEW = np.log(np.array([[[0.6, 0.5, 0.1, 0.5], [0.5, 0.5, 0.4, 0.4]]]))
RATIO = np.array([[[1.5, 0.5], [1.0, 0.64]]])  # products of 1.2 1.25, 0.5 1, 1 1, 0.8 0.8
VALID = np.ones((1, 1, 4), bool)
WEIGHT = np.ones((1, 1, 2), np.float32)


def loss(advantage, new=NEW, weight=WEIGHT, valid=VALID, **kwargs):
    total, denominator, metrics = losses.sib_grpo_loss(
        *map(jnp.asarray, (new, OLD, advantage, weight, valid)), **kwargs
    )
    return float(total), float(denominator), {k: float(v) for k, v in metrics.items()}


class TestRatio:
    def test_of_a_sequence_is_the_product(self):
        out = losses.unit_log_ratio(jnp.asarray(NEW), jnp.asarray(OLD), VALID, 2, "sequence")
        np.testing.assert_allclose(np.exp(out), RATIO, rtol=1e-5)

    def test_normalised_by_length_is_the_geometric_mean(self):
        out = losses.unit_log_ratio(
            jnp.asarray(NEW), jnp.asarray(OLD), VALID, 2, "length_normalised"
        )
        np.testing.assert_allclose(np.exp(out), np.sqrt(RATIO), rtol=1e-5)

    @pytest.mark.parametrize(("ratio", "expected"), [("sequence", 1.2), ("length_normalised", 1.2)])
    def test_padding_counts_for_nothing(self, ratio, expected):
        valid = np.array([[[True, False, False, False]]])
        out = losses.unit_log_ratio(jnp.asarray(NEW), jnp.asarray(OLD), valid, 2, ratio)
        np.testing.assert_allclose(np.exp(out)[0, 0], [expected, 1.0], rtol=1e-5)

    def test_an_unknown_ratio_is_refused(self):
        with pytest.raises(ValueError, match="sequence, length_normalised, got 'token'"):
            losses.unit_log_ratio(jnp.asarray(NEW), jnp.asarray(OLD), VALID, 2, "token")


class TestLoss:
    def test_sequence_by_hand(self):
        # 1.5 is clipped to 1.2 for a gain, 0.5 to 0.8 for a loss; 1 and 0.64 (a gain) are not.
        total, denominator, _ = loss([[[2.0, -1.0], [-2.0, 1.0]]])
        assert denominator == 4
        assert total == pytest.approx(-(1.2 * 2 - 0.8 * 1 - 1.0 * 2 + 0.64 * 1), rel=1e-5)

    def test_the_worse_side_is_never_clipped(self):
        # A bad trace made likelier, and a good one made less likely, keep their gradient.
        total, *_ = loss([[[-2.0, 1.0], [0.0, 0.0]]])
        assert total == pytest.approx(-(1.5 * -2 + 0.5 * 1), rel=1e-5)

    def test_length_normalised_by_hand(self):
        total, *_ = loss([[[2.0, -1.0], [-2.0, 1.0]]], ratio="length_normalised")
        r = np.sqrt(RATIO)[0]
        expected = -(1.2 * 2 - 0.8 * 1 - r[1, 0] * 2 + r[1, 1] * 1)
        assert r[0, 0] > 1.2
        assert r[0, 1] < 0.8
        assert total == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(("high", "gain"), [(0.2, 1.2), (0.28, 1.28), (0.6, 1.5)])
    def test_clip_higher(self, high, gain):
        total, *_ = loss([[[1.0, 0.0], [0.0, 0.0]]], clip_high=high)
        assert total == pytest.approx(-gain, rel=1e-5)

    @pytest.mark.parametrize(("low", "gain"), [(0.2, 0.8), (0.4, 0.6), (0.6, 0.5)])
    def test_clip_lower(self, low, gain):
        total, *_ = loss([[[0.0, -1.0], [0.0, 0.0]]], clip_low=low)
        assert total == pytest.approx(gain, rel=1e-5)

    def test_groups_without_weight_are_skipped(self):
        weight = np.array([[[1.0, 0.0]]], np.float32)
        total, denominator, _ = loss([[[2.0, 50.0], [-2.0, 50.0]]], weight=weight)
        assert denominator == 2
        assert total == pytest.approx(-(1.2 * 2 - 1.0 * 2), rel=1e-5)

    def test_nothing_to_learn_is_no_division_by_zero(self):
        total, denominator, _ = loss([[[1.0, 1.0], [1.0, 1.0]]], weight=0 * WEIGHT)
        assert (total, denominator) == (0, 1)

    def test_gradient_is_that_of_the_policy_where_ratios_are_one(self):
        advantage = jnp.array([[[2.0, -1.0], [-2.0, 1.0]]])

        def total(new):
            return losses.sib_grpo_loss(new, jnp.asarray(OLD), advantage, WEIGHT, VALID)[0]

        grad = jax.grad(total)(jnp.asarray(OLD))
        np.testing.assert_allclose(grad, -jnp.repeat(advantage, 2, axis=-1), rtol=1e-5)

    def test_clipped_traces_have_no_gradient(self):
        advantage = jnp.array([[[2.0, -1.0], [0.0, 0.0]]])

        def total(new):
            return losses.sib_grpo_loss(new, jnp.asarray(OLD), advantage, WEIGHT, VALID)[0]

        assert not np.any(jax.grad(total)(jnp.asarray(NEW)))


class TestMetrics:
    def test_ratio_extremes_and_clip_shares(self):
        _, _, metrics = loss([[[2.0, -1.0], [-2.0, 1.0]]])
        assert metrics["ratio_max"] == pytest.approx(1.5, rel=1e-5)
        assert metrics["ratio_min"] == pytest.approx(0.5, rel=1e-5)
        assert metrics["clip_high_share"] == metrics["clip_low_share"] == 0.25

    def test_kl_to_the_old_policy(self):
        valid = np.array([[[True, True, True, False]]])
        _, _, metrics = loss([[[1.0, 1.0], [1.0, 1.0]]], valid=valid)
        log_ratio = (NEW - OLD)[..., :3]
        assert metrics["kl_old_k1"] == pytest.approx(-log_ratio.mean(), rel=1e-5)
        k3 = (np.exp(log_ratio) - 1 - log_ratio).mean()
        assert metrics["kl_old_k3"] == pytest.approx(k3, rel=1e-4)
        assert k3 > 0

    def test_entropy_over_valid_decisions(self):
        logits = jnp.log(jnp.array([[[[1 / 3] * 3, [0.5, 0.25, 0.25], [0.98, 0.01, 0.01]]]]))
        valid = jnp.array([[[True, True, False]]])
        expected = (np.log(3) + 1.5 * np.log(2)) / 2
        assert float(losses.policy_entropy(logits, valid)) == pytest.approx(expected, rel=1e-5)
        assert float(losses.policy_entropy(logits, ~valid & False)) == 0
