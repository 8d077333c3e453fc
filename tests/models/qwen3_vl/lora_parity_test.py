"""LoRA of Qwen3-VL against PEFT on a tiny random model in float32; -s prints the errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmmem_jax.models.qwen3_vl.lora import (
    add_lora,
    join,
    load_adapter,
    save_adapter,
    split_lora,
)
from mmmem_jax.models.qwen3_vl.modeling import Tokens
from mmmem_jax.models.qwen3_vl.params import load_model
from mmmem_jax.models.qwen3_vl.vision import visual_inputs
from mmmem_jax.testing.qwen3_vl import TINY, write_checkpoint

torch = pytest.importorskip("torch", reason="needs mmmem_jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs mmmem_jax[parity]")
peft = pytest.importorskip("peft", reason="needs mmmem_jax[parity]")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks it
]

RANK, ALPHA = 4, 10.0
GRID = (1, 4, 6)
TOKENS = GRID[1] * GRID[2] // TINY.vision.merge_unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def adapted(folder):
    """(graphdef, lora, base) with a B that is not 0."""
    model = load_model(folder, dtype=jnp.float32, remat=True)
    split = split_lora(add_lora(model, rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(4)
    lora = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), split.lora)
    return split._replace(lora=lora)


@pytest.fixture(scope="module")
def reference(folder, adapted, tmp_path_factory):
    """The PyTorch model with our adapter, read by PEFT."""
    saved = tmp_path_factory.mktemp("adapter")
    save_adapter(saved, adapted.lora, rank=RANK, alpha=ALPHA, base=str(folder))
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    )
    return peft.PeftModel.from_pretrained(model, saved, is_trainable=True).eval()


@pytest.fixture(scope="module")
def asked():
    """(ids [L], patches of one image) of text around an image."""
    rng = np.random.default_rng(2)
    before, after = rng.integers(0, 300, 5), rng.integers(0, 300, 12)
    start, end = TINY.vision_start_token_id, TINY.vision_end_token_id
    ids = np.concatenate([before, [start], [TINY.image_token_id] * TOKENS, [end], after])
    patches = rng.normal(size=(GRID[1] * GRID[2], TINY.vision.patch_dim)).astype(np.float32)
    return ids, patches


@pytest.fixture(scope="module")
def wanted(reference, asked):
    """The reference's loss, positions and gradients by PEFT's names."""
    ids, patches = asked
    ids = torch.tensor(ids[None])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": 1 * (ids == TINY.image_token_id),
        "image_grid_thw": torch.tensor([GRID]),
    }
    positions, _ = reference.base_model.model.model.get_rope_index(**inputs)
    logits = reference(**inputs, pixel_values=torch.tensor(patches)).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    loss.backward()
    gradients = {
        name.replace(".default", ""): x.grad.numpy()
        for name, x in reference.named_parameters()
        if x.requires_grad
    }
    return loss.item(), positions[:, 0].T.numpy(), gradients


def test_loss_and_gradients(adapted, asked, wanted):
    ids, patches = asked
    wanted_loss, positions, wanted_gradients = wanted
    index = np.where(ids == TINY.image_token_id, np.cumsum(ids == TINY.image_token_id) - 1, -1)
    tokens = Tokens(ids[None], positions[None], np.ones((1, len(ids)), bool), index[None])
    inputs = visual_inputs([(patches, GRID)], TINY.vision)

    @jax.jit
    @jax.value_and_grad
    def loss_of(lora, tokens, inputs):
        model = nnx.merge(adapted.graphdef, join(lora, adapted.base))
        hidden, _ = model(tokens, model.vision(inputs))
        log_probs = jax.nn.log_softmax(model.logits(hidden)[0, :-1])
        return -jnp.take_along_axis(log_probs, ids[1:, None], axis=1).mean()

    loss, gradients = loss_of(adapted.lora, tokens, inputs)
    assert float(loss) == pytest.approx(wanted_loss, rel=1e-5)
    errors = {}
    for name, sides in gradients["layers"].items():
        for side in "ab":
            for layer, found in enumerate(sides[f"kernel_lora_{side}"][...]):
                path = f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}"
                truth = wanted_gradients.pop(f"{path}.lora_{side.upper()}.weight")
                assert np.abs(truth).max() > 1e-5
                errors[layer, name, side] = np.abs(found.T - truth).max() / np.abs(truth).max()
    assert not wanted_gradients
    print("largest error of a gradient", max(errors.values()), "of", len(errors))
    assert max(errors.values()) < 1e-3


def test_what_peft_saves_comes_back(adapted, reference, tmp_path):
    reference.save_pretrained(tmp_path)
    blank = jax.tree.map(jnp.zeros_like, adapted.lora)
    found = load_adapter(tmp_path, blank, rank=RANK, alpha=ALPHA)
    jax.tree.map(np.testing.assert_array_equal, found, adapted.lora)
