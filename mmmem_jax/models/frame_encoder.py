"""The world's eye: a small classifier of the words a frame shows, at two resolutions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8


class FrameEncoder(nnx.Module):
    """Word logits of a 16 x 16 frame at full resolution (fine) and averaged over 2 x 2 (coarse)."""

    def __init__(self, num_words: int, hidden: int = 128, *, rngs: nnx.Rngs):
        self.patch = nnx.Linear(4 * 4 * 3, 48, rngs=rngs)
        self.fine = nnx.Linear(16 * 48, hidden, rngs=rngs)
        self.fine_out = nnx.Linear(hidden, num_words, rngs=rngs)
        self.coarse = nnx.Linear(8 * 8 * 3, hidden, rngs=rngs)
        self.coarse_out = nnx.Linear(hidden, num_words, rngs=rngs)

    def __call__(
        self, frames: UInt8[Array, "B 16 16 3"]
    ) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
        """Returns (fine, coarse) word logits."""
        x = frames.astype(jnp.float32) / 127.5 - 1.0
        b = x.shape[0]
        patches = x.reshape(b, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 16, 48)
        fine = jax.nn.gelu(self.patch(patches)).reshape(b, 16 * 48)
        fine = self.fine_out(jax.nn.gelu(self.fine(fine)))
        low = x.reshape(b, 8, 2, 8, 2, 3).mean((2, 4)).reshape(b, 8 * 8 * 3)
        return fine, self.coarse_out(jax.nn.gelu(self.coarse(low)))


def frame_loss(
    model: FrameEncoder, frames: UInt8[Array, "B 16 16 3"], shown: Float[Array, "B V"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean binary cross-entropy over words of both resolutions; metrics: recall of shown words."""
    logits = jnp.stack(model(frames))
    loss = -jnp.mean(shown * jax.nn.log_sigmoid(logits) + (1 - shown) * jax.nn.log_sigmoid(-logits))
    recall = jnp.sum((logits > 0) * shown, (1, 2)) / jnp.maximum(shown.sum(), 1.0)
    return loss, {"loss": loss, "recall_fine": recall[0], "recall_coarse": recall[1]}
