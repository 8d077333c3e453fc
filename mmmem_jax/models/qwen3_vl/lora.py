"""LoRA on the attention of the language model, by qwix, and as adapter folders that PEFT reads.

    graphdef, lora, base = split_lora(add_lora(model, rank=64, alpha=128.0, rngs=nnx.Rngs(0)))
    model = nnx.merge(graphdef, join(lora, base))

An adapted matrix gives x W + (alpha / rank) x A B (LoRA, arXiv 2106.09685). There is no dropout:
what is sampled and what is scored have to agree.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import qwix
import safetensors
import safetensors.numpy
from flax import nnx

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.language import DecoderLayer
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL
from mmmem_jax.models.qwen3_vl.rules import RULES
from mmmem_jax.train.sharding import by_rules

TARGETS = ("k_proj", "o_proj", "q_proj", "v_proj")
CONFIG_KEYS = ("peft_type", "r", "lora_alpha", "target_modules")  # of PEFT, as are OTHER_LORAS
OTHER_LORAS = ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora")  # switches of PEFT
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_init_a = nnx.initializers.he_uniform(in_axis=-2, out_axis=-1, batch_axis=(0,))


class LoraSplit(NamedTuple):
    """A model with LoRA, taken apart."""

    graphdef: nnx.GraphDef
    lora: nnx.State  # float32, to be trained
    base: nnx.State  # all else


def add_lora(model: Qwen3VL, *, rank: int = 64, alpha: float = 128.0, rngs: nnx.Rngs) -> Qwen3VL:
    """A model with LoRA on q, k, v and o of every layer, which at first gives what `model` gives.

    Args:
      model: is left as it is; the new model shares its arrays.
      rank: of A and B.
      alpha: the adapter's output is scaled by alpha / rank.
      rngs: draws A; B is 0.

    Returns:
      Layers have kernel_lora_a [N, in, rank] and kernel_lora_b [N, rank, out], of the model's
      dtype and on its mesh.
    """
    text = model.config.text
    graphdef, adapters, _ = nnx.split(
        nnx.eval_shape(lambda: _adapted_layer(model, rank, alpha)), nnx.LoRAParam, ...
    )

    def start(path, x):
        shape = (text.num_layers, *x.shape)
        if _is_a(path):
            return _init_a(rngs.params(), shape, x.dtype)
        return jnp.zeros(shape, x.dtype)

    adapters = jax.tree.map_with_path(start, adapters)
    if model.mesh is not None:
        shardings = by_rules(model.mesh, {"layers": adapters}, RULES)["layers"]
        adapters = jax.device_put(adapters, shardings)
    adapted = nnx.merge(*nnx.split(model))
    adapted.layers = nnx.merge(graphdef, adapters, nnx.state(model.layers))
    return adapted


def _adapted_layer(model: Qwen3VL, rank: int, alpha: float) -> DecoderLayer:
    """One layer with LoRA; qwix finds what to adapt by running it."""
    text, dtype = model.config.text, model.dtype
    layer = DecoderLayer(
        text, dtype=dtype, attention=model.layers.attention, mesh=model.mesh, rngs=nnx.Rngs(0)
    )
    provider = qwix.LoraProvider(
        module_path=rf".*({'|'.join(TARGETS)})", rank=rank, alpha=float(alpha)
    )
    x, angles = (
        jnp.zeros((1, 1, text.hidden_size), dtype),
        jnp.zeros((1, 1, text.head_dim // 2), dtype),
    )
    return qwix.apply_lora_to_model(layer, provider, x, (angles, angles), rngs=nnx.Rngs(0))


def split_lora(model: Qwen3VL) -> LoraSplit:
    """Takes a model with LoRA apart; the adapter becomes float32, as small updates need."""
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    return LoraSplit(graphdef, jax.tree.map(lambda x: x.astype(jnp.float32), lora), base)


def join(lora: nnx.State, base: nnx.State) -> nnx.State:
    """All parameters for the graphdef of `split_lora`, the adapter in the dtype of the model.

    qwix adds an adapter's output to the layer's in the wider dtype of both, so that one left in
    float32 would make all that follows float32. Gradients reach the float32 values.
    """
    dtype = base["layers"]["q_proj"]["kernel"].dtype
    return nnx.merge_state(jax.tree.map(lambda x: x.astype(dtype), lora), base)


def without_lora(lora: nnx.State) -> nnx.State:
    """An adapter that changes nothing: B is 0. The model that a policy is kept near to."""
    return jax.tree.map_with_path(lambda path, x: x if _is_a(path) else jnp.zeros_like(x), lora)


def save_adapter(
    folder: str | Path, lora: nnx.State, *, rank: int, alpha: float, base: str
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT reads them.

    Args:
      folder: made where it is missing; here, or an `epath.Path` in a bucket.
      lora: from `split_lora`, on devices of this host.
      rank: of `add_lora`.
      alpha: of `add_lora`.
      base: folder or owner/name of the model that it is for.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, x in jax.tree.leaves_with_path(lora):
        for name, matrix in zip(_names(path, len(x)), np.asarray(x), strict=True):
            tensors[name] = np.ascontiguousarray(matrix.T)
    content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).write_bytes(content)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(TARGETS),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: str | Path, lora: nnx.State, *, rank: int, alpha: float) -> nnx.State:
    """Reads an adapter folder into the dtypes and onto the devices of `lora`.

    Args:
      folder: as `save_adapter` or PEFT writes them.
      lora: from `split_lora`.
      rank: of `add_lora`.
      alpha: of `add_lora`.

    Raises:
      UserError: if a file is missing or broken, rank, alpha or adapted matrices are others, or a
        tensor is missing, extra or of another shape.
    """
    folder = Path(folder)
    _check_config(folder / CONFIG_FILE, rank, alpha)
    path = folder / WEIGHTS_FILE
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); save the adapter again"
        ) from error

    def take(at, x):
        stack = []
        for name in _names(at, len(x)):
            if name not in tensors:
                raise UserError(f"{path} has no {name}; it is no adapter of this model")
            found = tensors.pop(name)
            if found.T.shape != x.shape[1:]:
                wanted = x.shape[:0:-1]
                raise UserError(f"{path} has {name} of shape {found.shape}, not {wanted}")
            stack.append(found.T.astype(x.dtype))
        return jax.device_put(np.stack(stack), x.sharding)

    filled = jax.tree.map_with_path(take, lora)
    if tensors:
        raise UserError(f"{path} has {min(tensors)}, which is nowhere in this model")
    return filled


def with_adapter(model: Qwen3VL, folder: str | Path) -> Qwen3VL:
    """A model with the adapter of a folder, of the rank and alpha that the folder says.

    Args:
      model: is left as it is; the new model shares its arrays.
      folder: as `save_adapter` or PEFT writes them.

    Raises:
      UserError: as `load_adapter` does.
    """
    path = Path(folder) / CONFIG_FILE
    found = _read_config(path)
    rank, alpha = found["r"], found["lora_alpha"]
    if not (isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0 < alpha):
        raise UserError(f"{path} has r {rank!r} and lora_alpha {alpha!r}; both must be over 0")
    adapted = add_lora(model, rank=rank, alpha=alpha, rngs=nnx.Rngs(0))
    graphdef, lora, base = nnx.split(adapted, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, load_adapter(folder, lora, rank=rank, alpha=alpha), base)


def _check_config(path: Path, rank: int, alpha: float) -> None:
    """Raises UserError unless an adapter_config.json is that of the adapter asked for."""
    wanted = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [*TARGETS]}
    found = _read_config(path)
    if isinstance(found["target_modules"], list):  # in any order
        found["target_modules"].sort(key=str)
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(f"{path} has {name} {found[name]!r}, and this model's is {value!r}")


def _read_config(path: Path) -> dict[str, Any]:
    """What an adapter_config.json says of a LoRA; UserError if it is none, or no plain one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = {name: config[name] for name in CONFIG_KEYS}
        other = [name for name in OTHER_LORAS if config.get(name)]
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; name the folder of an adapter") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no config of an adapter ({error!r})") from error
    if other:
        raise UserError(f"{path} has {other[0]}; only plain LoRA is read")
    return found


def _is_a(path) -> bool:
    return "kernel_lora_a" in jax.tree_util.keystr(path)


def _names(path, num_layers: int) -> list[str]:
    """PEFT's names of a stacked parameter, one for every layer."""
    module, side = re.search(r"(\w_proj)\W+kernel_lora_([ab])", jax.tree_util.keystr(path)).groups()
    layers = "base_model.model.model.language_model.layers"
    return [
        f"{layers}.{i}.self_attn.{module}.lora_{side.upper()}.weight" for i in range(num_layers)
    ]
