"""A tiny model that decides about random streams, for the tests of its rollouts and updates."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmmem_jax.data.token_streams import TokenStream
from mmmem_jax.models.qwen3_vl import lora
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL
from mmmem_jax.sib.token_prompts import Wording
from mmmem_jax.sib.token_rollout import Decider
from mmmem_jax.testing.qwen3_vl import TINY, random_params

B, G, T, L = 2, 4, 4, 5
WORDING = Wording(((1, 2), (3,), (4,), (5, 6)), (10, 11, 12), (13,), TINY.image_token_id)


def make_setup(max_new_tokens=1, mesh=None, dtype=jnp.float32):
    """(decider, adapter that changes what the model says, base)."""
    abstract = nnx.eval_shape(lambda: Qwen3VL(TINY, mesh=mesh, dtype=dtype, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_params(TINY, 0))
    model = lora.add_lora(
        nnx.merge(nnx.graphdef(abstract), params), rank=2, alpha=4.0, rngs=nnx.Rngs(0)
    )
    graphdef, adapter, base = lora.split_lora(model)
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    adapter = jax.tree.map(jnp.add, adapter, jax.tree.unflatten(treedef, noise))
    return Decider(graphdef, WORDING, (2, 2), max_new_tokens, 0.7), adapter, base


def make_batch(seed=0) -> TokenStream:
    """Random streams of word ids 20 to 29; the last clip of the second is padding."""
    rng = np.random.default_rng(seed)

    def words(*shape):
        valid = np.arange(shape[-1]) < rng.integers(1, shape[-1] + 1, shape[:-1])[..., None]
        return np.where(valid, rng.integers(20, 30, shape), 0).astype(np.int32), valid

    caption, caption_valid = words(B, T, 3)
    question, question_valid = words(B, 3, 4)
    subject, subject_valid = words(B, 3, 1)
    option, option_valid = words(B, 3, 4, 1)
    valid = np.ones((B, T), bool)
    valid[1, -1] = False
    return TokenStream(
        caption=caption, caption_valid=caption_valid,
        patches=rng.normal(size=(B, T, 4, TINY.vision.patch_dim)).astype(np.float32),
        valid=valid, teacher=rng.integers(3, size=(B, T)).astype(np.int32),
        question=question, question_valid=question_valid,
        subject=subject, subject_valid=subject_valid,
        option=option, option_valid=option_valid,
        answer=rng.integers(4, size=(B, 3)).astype(np.int32), asked=np.ones((B, 3), bool),
    )  # fmt: skip
