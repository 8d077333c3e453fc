"""Drawing actions."""

import jax
import jax.numpy as jnp
import numpy as np

from mmmem_jax.policies.sampling import sample_action

draw = jax.vmap(sample_action, in_axes=(None, 0))


def test_each_action_gets_its_share_of_the_unit_interval():
    noise = (jnp.arange(1000) + 0.5) / 1000
    actions = draw(jnp.log(jnp.array([0.2, 0.5, 0.3])), noise)
    assert np.bincount(actions, minlength=3).tolist() == [200, 500, 300]


def test_needs_no_normalised_probabilities():
    noise = (jnp.arange(1000) + 0.5) / 1000
    logits = jnp.array([1.0, -2.0, 0.5])
    assert np.array_equal(draw(logits, noise), draw(logits + 80.0, noise))


def test_an_impossible_action_is_never_drawn():
    ends = jnp.array([1e-30, 1e-7, 0.5, 1.0 - 1e-7, 1.0])  # noise is never 0
    for impossible in range(3):
        logits = jnp.zeros(3).at[impossible].set(-jnp.inf)
        assert impossible not in draw(logits, ends).tolist()
