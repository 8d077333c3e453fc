"""How the parameters of a Qwen3-VL are split over the mesh, for `train.sharding.by_rules`.

FSDP over 'data' times tensor parallelism over 'model': what goes into heads and hidden units is
split by its outputs over 'model', what comes out of them by its inputs, so that a half-layer needs
one sum over 'model'; the other side is split over 'data' and gathered where it is used. Stacked
parameters keep their leading axis of layers whole, as the loop over layers indexes it.

Where a device has room for what `model` alone splits, `without_fsdp` gathers nothing over 'data'.
"""

from jax.sharding import PartitionSpec

from mmmem_jax.train.sharding import Rules

RULES: Rules = (
    (r"\blayers\.(q|k|v)_proj\.kernel_lora_a$", PartitionSpec(None, "data")),
    (r"\blayers\.(q|k|v)_proj\.kernel_lora_b$", PartitionSpec(None, None, "model")),
    (r"\blayers\.o_proj\.kernel_lora_a$", PartitionSpec(None, "model")),
    (r"\blayers\.o_proj\.kernel_lora_b$", PartitionSpec(None, None, "data")),
    (r"\blayers\.(q|k|v|gate|up)_proj\.kernel$", PartitionSpec(None, "data", "model")),
    (r"\blayers\.(o|down)_proj\.kernel$", PartitionSpec(None, "model", "data")),
    (r"\bblocks\.(qkv|fc1)\.kernel$", PartitionSpec(None, "data", "model")),
    (r"\bblocks\.(qkv|fc1)\.bias$", PartitionSpec(None, "model")),
    (r"\bblocks\.(proj|fc2)\.kernel$", PartitionSpec(None, "model", "data")),
    (r"\b(merger|deepstack\.\d+)\.fc1\.kernel$", PartitionSpec("data", "model")),
    (r"\b(merger|deepstack\.\d+)\.fc1\.bias$", PartitionSpec("model")),
    (r"\b(merger|deepstack\.\d+)\.fc2\.kernel$", PartitionSpec("model", "data")),
    (r"\bpatch_embed\.kernel$", PartitionSpec("data", "model")),
    (r"\bembed\.embedding$", PartitionSpec("model", "data")),
    (r"\blm_head\.kernel$", PartitionSpec("data", "model")),
    # Small ones, and those that are added to what is split over the batch alone.
    (r"\bpos_embed\.embedding$", PartitionSpec()),
    (r"norm\d?\.(scale|bias)$", PartitionSpec()),
    (r"\b(proj|fc2|patch_embed)\.bias$", PartitionSpec()),
    (r"\b(rng|step|count)$", PartitionSpec()),
)


def without_fsdp(rules: Rules = RULES) -> Rules:
    """The same rules, with nothing split over 'data'."""
    return tuple(
        (pattern, PartitionSpec(*(None if axis == "data" else axis for axis in spec)))
        for pattern, spec in rules
    )
