"""Official Qwen3-VL folders: read straight onto the mesh, and written back.

    config.json  model.safetensors
    config.json  model.safetensors.index.json  model-00001-of-00004.safetensors  ...

The files have a tensor for every layer, and matrices as [out, in]; the model has one parameter for
all layers, and matrices as [in, out].
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from mmmem_jax.errors import UserError
from mmmem_jax.models.qwen3_vl.config import Qwen3VLConfig, read_config, to_json
from mmmem_jax.models.qwen3_vl.modeling import Qwen3VL
from mmmem_jax.models.qwen3_vl.rules import RULES
from mmmem_jax.train.sharding import Rules, by_rules

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PATCHES = "vision.patch_embed.kernel"  # a convolution in the files

# (module here, module in the files); {} is the number of a layer.
MODULES = (
    (r"embed", "model.language_model.embed_tokens"),
    (r"norm", "model.language_model.norm"),
    (r"lm_head", "lm_head"),
    (r"layers\.([qkvo]_proj|[qk]_norm)", r"model.language_model.layers.{}.self_attn.\1"),
    (r"layers\.((?:gate|up|down)_proj)", r"model.language_model.layers.{}.mlp.\1"),
    (r"layers\.(input|post_attention)_norm", r"model.language_model.layers.{}.\1_layernorm"),
    (r"vision\.patch_embed", "model.visual.patch_embed.proj"),
    (r"vision\.pos_embed", "model.visual.pos_embed"),
    (r"vision\.blocks\.(norm[12])", r"model.visual.blocks.{}.\1"),
    (r"vision\.blocks\.(qkv|proj)", r"model.visual.blocks.{}.attn.\1"),
    (r"vision\.blocks\.(fc[12])", r"model.visual.blocks.{}.mlp.linear_\1"),
    (r"vision\.merger\.norm", "model.visual.merger.norm"),
    (r"vision\.merger\.(fc[12])", r"model.visual.merger.linear_\1"),
    (r"vision\.deepstack\.(\d+)\.norm", r"model.visual.deepstack_merger_list.\1.norm"),
    (r"vision\.deepstack\.(\d+)\.(fc[12])", r"model.visual.deepstack_merger_list.\1.linear_\2"),
)
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class Source(NamedTuple):
    """Where a parameter lies in the files."""

    names: tuple[str, ...]  # its tensors, one for every layer where it is stacked
    shape: tuple[int, ...]  # of each of them
    stacked: bool
    transposed: bool


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, downloaded once if it is named as owner/name on Hugging Face.

    Raises:
      UserError: if there is no such folder and it cannot be downloaded.
    """
    if str(name_or_path) and Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name_or_path)):
        raise UserError(f"{name_or_path} is neither a folder nor a model's owner/name; check it")
    try:
        found = huggingface_hub.snapshot_download(
            str(name_or_path),
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"],
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name_or_path} is no folder here and cannot be downloaded ({reason}); check the name"
            " and the network, or give the path of a downloaded folder"
        ) from error
    return Path(found)


def load_model(
    folder: str | Path,
    *,
    dtype=jnp.bfloat16,
    mesh: Mesh | None = None,
    attention: str = "xla",
    remat: bool = False,
    rules: Rules = RULES,
) -> Qwen3VL:
    """The model of an official folder, on the mesh as the rules have it, or on the first device.

    Raises:
      UserError: as `read_config`, `load_params` and `by_rules` do.
    """
    config = read_config(folder)
    abstract = nnx.eval_shape(
        lambda: Qwen3VL(
            config, dtype=dtype, attention=attention, remat=remat, mesh=mesh, rngs=nnx.Rngs(0)
        )
    )
    graphdef, state = nnx.split(abstract)
    shardings = None if mesh is None else by_rules(mesh, state, rules)
    return nnx.merge(graphdef, load_params(folder, state, shardings=shardings))


def load_params(folder: str | Path, abstract: nnx.State, *, shardings=None) -> nnx.State:
    """Fills a state with the tensors of a folder; a host reads what its own devices hold.

    Args:
      folder: with config.json and safetensors files.
      abstract: the parameters, their shapes and dtypes.
      shardings: of every parameter; None: all on the first device.

    Raises:
      UserError: names a file that is missing or broken, and a tensor that is missing, extra or of
        another shape.
    """
    folder, config = Path(folder), read_config(folder)
    if shardings is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, abstract)
    sources = {
        name: locate(name, x.shape, config)
        for name, x in ((_name(path), x) for path, x in jax.tree.leaves_with_path(abstract))
    }
    with ExitStack() as stack:
        files = _open(folder, stack)
        _check(folder, files, sources)
        return jax.tree.map_with_path(
            lambda path, x, sharding: _load(files, sources[_name(path)], x, sharding),
            abstract,
            shardings,
        )


def locate(name: str, shape: tuple[int, ...], config: Qwen3VLConfig) -> Source:
    """Where the parameter of a path such as "layers.q_proj.kernel" lies in the files.

    Raises:
      ValueError: if there is none such, as of LoRA, which lies in folders of its own.
    """
    module, leaf = name.rsplit(".", 1)
    matches = ((re.fullmatch(ours, module), theirs) for ours, theirs in MODULES)
    official = next((match.expand(theirs) for match, theirs in matches if match), None)
    if official is None or leaf not in LEAVES:
        raise ValueError(f"{name} is no parameter of a Qwen3-VL")
    official = f"{official}.{LEAVES[leaf]}"
    stacked, transposed = "{}" in official, leaf == "kernel"
    names = tuple(official.format(i) for i in range(shape[0])) if stacked else (official,)
    shape = shape[1:] if stacked else shape
    shape = shape[::-1] if transposed else shape
    if name == PATCHES:
        vision = config.vision
        size = vision.patch_size
        shape = (shape[0], vision.in_channels, vision.temporal_patch_size, size, size)
    return Source(names, shape, stacked, transposed)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # of nnx


def _open(folder: Path, stack: ExitStack) -> dict[str, tuple[Path, "safetensors.safe_open"]]:
    """{tensor: (file, opened)} of all safetensors files of a folder."""
    found = {}
    for name, tensors in _listed(folder).items():
        path = folder / name
        try:
            opened = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing; fetch the folder again") from error
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}); fetch it again"
            ) from error
        held = set(opened.keys())
        if tensors is not None and (wrong := sorted(held ^ tensors)):
            place = "holds" if wrong[0] in held else "does not hold"
            raise UserError(f"{path} {place} {wrong[0]}, unlike {INDEX} says; fetch both again")
        found |= dict.fromkeys(held, (path, opened))
    return found


def _listed(folder: Path) -> dict[str, set[str] | None]:
    """{file name: tensors that the index says it has}; None where there is no index."""
    path = folder / INDEX
    if not path.is_file():
        if not (folder / SINGLE).is_file():
            raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}; fetch the folder again")
        return {SINGLE: None}
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index of tensors ({error!r}); fetch it again") from error
    listed: dict[str, set[str] | None] = {}
    for tensor, name in placed:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UserError(
                f"{path} places {tensor} in {name!r}, no file of its folder; fetch it again"
            )
        listed.setdefault(name, set()).add(tensor)
    return listed


def _check(folder: Path, files: Mapping, sources: Mapping[str, Source]) -> None:
    """Raises UserError unless the files have the tensors of the sources, no others."""
    shapes = {name: source.shape for source in sources.values() for name in source.names}
    for name, shape in shapes.items():
        if name not in files:
            raise UserError(f"{folder} has no tensor {name} of shape {shape}; fetch it again")
        path, opened = files[name]
        if (found := tuple(opened.get_slice(name).get_shape())) != shape:
            raise UserError(f"{path} has {name} of shape {found}, and config.json makes it {shape}")
    if extra := sorted(files.keys() - shapes.keys()):
        path = files[extra[0]][0]
        raise UserError(f"{path} has {extra[0]}, which the model of config.json does not have")


def _load(files: Mapping, source: Source, abstract, sharding: Sharding) -> jax.Array:
    """One parameter on its devices; what several of them hold is read once."""
    shape, read = sharding.shard_shape(abstract.shape), {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in read:
            read[key] = _read(files, source, index, np.empty(shape, abstract.dtype))
        return read[key]

    return jax.make_array_from_callback(abstract.shape, sharding, shard)


def _read(files: Mapping, source: Source, index: tuple[slice, ...], out: np.ndarray) -> np.ndarray:
    """Fills `out` with a slice of a parameter, tensor by tensor, cast to its dtype."""
    names = source.names[index[0]] if source.stacked else source.names
    where = index[1:] if source.stacked else index
    for name, target in zip(names, out if source.stacked else out[None], strict=True):
        _, opened = files[name]
        tensor = opened.get_slice(name)
        if not source.transposed:
            target[...] = tensor[where]
        elif len(source.shape) == 2:
            target[...] = tensor[where[::-1]].T
        else:
            rows = tensor[where[1]]
            target[...] = rows.reshape(len(rows), -1)[:, where[0]].T
    return out


def save_params(
    folder: str | Path, params: nnx.State, config: Qwen3VLConfig, *, max_shard_bytes: float = 5e9
) -> None:
    """Writes config.json and the safetensors of a model, as official folders have them.

    Args:
      folder: made where it is missing.
      params: the parameters of a Qwen3VL, every array of them on devices of this host.
      config: of the model.
      max_shard_bytes: of a file; more than that gives several and an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(params, config, max_shard_bytes)
    dtype = next(iter(jax.tree.leaves(params))).dtype
    (folder / "config.json").write_text(json.dumps(to_json(config, str(dtype)), indent=2) + "\n")
    placed, total = {}, 0
    for i, shard in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {tensor: _tensor(*at) for tensor, at in shard.items()}
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(params: nnx.State, config: Qwen3VLConfig, max_bytes: float) -> list[dict[str, tuple]]:
    """[{tensor: (parameter, source, number in it)}], each of at most `max_bytes` or one tensor."""
    shards, size = [{}], 0
    for path, x in jax.tree.leaves_with_path(params):
        source = locate(_name(path), x.shape, config)
        one = math.prod(source.shape) * x.dtype.itemsize
        for i, name in enumerate(source.names):
            if shards[-1] and size + one > max_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = (x, source, i)
            size += one
    return shards


def _tensor(x: jax.Array, source: Source, i: int) -> np.ndarray:
    """Tensor i of a parameter as the files have it."""
    one = np.asarray(x[i] if source.stacked else x)
    return np.ascontiguousarray(one.T if source.transposed else one).reshape(source.shape)
