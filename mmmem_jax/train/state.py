"""State of a supervised phase, and its update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct


@struct.dataclass
class TrainState:
    """Parameters, optimizer, key and step of a phase."""

    params: nnx.State
    opt_state: optax.OptState
    rng: jax.Array  # [2] uint32, key data; step i uses fold_in(key, i)
    step: jax.Array  # [] int32


def init_state(params: nnx.State, optimizer: optax.GradientTransformation, rng_key) -> TrainState:
    """A state at step 0."""
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(rng_key),
        step=jnp.asarray(0, jnp.int32),
    )


def step_key(state) -> jax.Array:
    """The key of the state's next step."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def make_update(loss_fn: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """(state, batch) -> (state, metrics); loss_fn(params, rng_key, batch) -> (loss, metrics)."""

    def update(state: TrainState, batch):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, step_key(state), batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics

    return update
