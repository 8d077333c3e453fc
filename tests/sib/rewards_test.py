"""The reward of eq. 10, term by term."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.sib import rewards

PROBS = np.array([[0.7, 0.1, 0.1, 0.1], [0.3, 0.4, 0.2, 0.1], [0.25] * 4], np.float32)
WITHOUT = np.array([[0.25] * 4, [0.2, 0.5, 0.2, 0.1], [0.25] * 4], np.float32)
ANSWER = np.array([0, 0, 3])
VALID = np.array([True, True, False])


def reward(kind, probs=PROBS, valid=VALID, without=WITHOUT):
    return rewards.task_reward(
        jnp.log(probs), jnp.asarray(ANSWER), jnp.asarray(valid), kind, jnp.log(without)
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("accuracy", 0.5),
        ("probability", 0.5),
        ("log_prob", (np.log(0.7) + np.log(0.3)) / 2),
        ("log_gain", (np.log(0.7 / 0.25) + np.log(0.3 / 0.2)) / 2),
    ],
)
class TestTask:
    def test_is_the_mean_over_valid_questions(self, kind, expected):
        assert float(reward(kind)) == pytest.approx(expected, rel=1e-5)

    def test_takes_any_leading_axes(self, kind, expected):
        out = reward(kind, probs=np.broadcast_to(PROBS, (2, 5, 3, 4)))
        np.testing.assert_allclose(out, np.full((2, 5), expected), rtol=1e-5)

    def test_is_zero_without_questions(self, kind, expected):
        assert float(reward(kind, valid=np.zeros(3, bool))) == 0

    def test_invalid_questions_may_hold_anything(self, kind, expected):
        probs = PROBS.copy()
        probs[2] = np.nan
        assert float(reward(kind, probs=probs)) == pytest.approx(expected, rel=1e-5)


def test_gain_of_no_memory_is_zero():
    assert float(reward("log_gain", probs=WITHOUT)) == pytest.approx(0, abs=1e-6)


def test_unknown_rewards_are_refused():
    with pytest.raises(ValueError, match="got 'bleu'"):
        reward("bleu")
    with pytest.raises(ValueError, match="got 'log_gain'"):
        rewards.task_reward(jnp.log(PROBS), jnp.asarray(ANSWER), jnp.asarray(VALID), "log_gain")


class TestTerms:
    RNG = np.random.default_rng(0)
    TASK, LENGTH = RNG.normal(size=(2, 2, 3, 2)).astype(np.float32)
    LOG_PROB, REF = RNG.normal(size=(2, 2, 3, 8)).astype(np.float32)
    MASK = np.arange(8)[None, None] < np.array([8, 6])[:, None, None]

    def terms(self):
        arrays = (self.TASK, self.LENGTH, self.LOG_PROB, self.REF, self.MASK)
        return rewards.terms(*map(jnp.asarray, arrays))

    def test_kl_is_the_log_ratio_of_the_actions_taken(self):
        ratio = (self.LOG_PROB - self.REF) * self.MASK
        expected = np.stack([ratio[..., :4].sum(-1), ratio[..., 4:].sum(-1)], -1)
        np.testing.assert_allclose(self.terms().log_ratio, expected, atol=1e-5)

    def test_weigh_is_equation_ten(self):
        terms = self.terms()
        out = rewards.weigh(terms, beta1=0.1, beta2=0.3)
        expected = self.TASK - 0.1 * self.LENGTH - 0.3 * np.asarray(terms.log_ratio)
        np.testing.assert_allclose(out, expected, atol=1e-6)

    def test_without_weights_only_the_task_is_left(self):
        np.testing.assert_array_equal(rewards.weigh(self.terms(), 0.0, 0.0), self.TASK)
