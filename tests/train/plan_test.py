"""Tests of mmmem_jax/train/plan.py: what a compiled update takes and exchanges."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from configs import egolife
from mmmem_jax.errors import UserError
from mmmem_jax.train import plan, sharding, text_job


def collectives(function, in_spec, out_spec, *shape):
    mesh = sharding.make_mesh(8)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return plan.collectives_of(jax.jit(mapped).lower(x).compile().as_text())


def test_collectives_are_counted_as_often_as_they_run():
    def summed_in_loops(x):
        def inner(total, _):
            return total + jax.lax.psum(jnp.sin(total), "data"), None

        def outer(total, _):
            total, _ = jax.lax.scan(inner, total, length=3)
            return total * 2, None

        return jax.lax.scan(outer, x, length=5)[0]

    (found,) = collectives(summed_in_loops, P("data"), P("data"), 16)
    assert found == plan.Collective("all-reduce", ("f32[2]",), (2,), 8, 15)


def test_collectives_are_told_apart_and_measured():
    def gathered(x):
        return jax.lax.all_gather(x, "data"), jax.lax.ppermute(x, "data", [(0, 1)]).astype(bool)

    found = collectives(gathered, P("data"), (P(), P("data")), 16, 3)
    sizes = {c.kind: (c.num_bytes, c.times) for c in found}
    assert sizes == {"all-gather": (16 * 3 * 4, 1), "collective-permute": (2 * 3 * 4, 1)}


def test_a_program_of_one_device_exchanges_nothing():
    program = jax.jit(jnp.sin).lower(jnp.zeros(3)).compile()
    assert plan.collectives_of(program.as_text()) == []


TPU_TEXT = """HloModule jit_update, is_scheduled=true

%cond (p: (s32[], f32[16,8])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(4)
  %p = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c.1), direction=LT
}

%body (p.1: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %r = bf16[16,8]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=1, to_apply=%add
  %s = (f32[496]{0:T(512)}, f32[4,496]{0:T(512)}, u32[]{:S(2)}) all-gather-start(%y), channel_id=2
  %d = f32[4,496]{0:T(512)} all-gather-done(%s)
}

ENTRY %main (a: f32[16,8]) -> f32[16,8] {
  %w = (s32[]{:T(128)}, f32[16,8]) while(%t), condition=%cond, body=%body, metadata={}
}
"""


def test_reads_what_is_compiled_for_tpus():
    assert plan.collectives_of(TPU_TEXT) == [
        plan.Collective("all-reduce", ("bf16[16,8]",), (128,), 256, 4),
        plan.Collective("all-gather", ("f32[4,496]",), (4 * 496,), 16 * 496, 4),
    ]


def toy_program(config, devices) -> plan.Program:
    """As quick to compile as a program can be that lies on a mesh and exchanges something."""
    mesh = sharding.make_mesh(**config.mesh, devices=devices)

    def update(state, batch):
        return jax.tree.map(lambda x: x + batch.sum(0), state), {}

    state = {"mid": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    batch = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    return plan.Program(mesh, state, sharding.keep_placed(mesh, update), batch)


@pytest.fixture
def config():
    return egolife.get_config("smoke")


def test_says_what_fits(config, capsys, monkeypatch):
    config.mesh.update({"data": -1, "group": 2, "model": 2})
    assert plan.report(toy_program, config, None)
    first, memory, total, collectives, *kinds = capsys.readouterr().out.splitlines()
    assert first == "8 of 8 cpu: mesh data 2 x group 2 x model 2"
    assert memory.startswith("a device: arguments 256 B, outputs 0 B, temporaries ")
    assert total.startswith("total ")
    assert total.endswith(": fits")
    assert collectives == "collectives of an update: 1"
    assert kinds == ["  1 all-reduce, run 1 times: 32 B a device, 32 B at most at a time"]
    monkeypatch.setattr(plan, "memory_of_device", lambda topology, device: 200)
    config.mesh.update({"data": 1, "group": 1, "model": 1})
    assert not plan.report(toy_program, config, None)
    *_, total, collectives = capsys.readouterr().out.splitlines()
    assert total.endswith(" of 200 B: does not fit")
    assert collectives == "collectives of an update: none"


def test_what_cannot_be_compiled_for_lack_of_memory_does_not_fit(config, capsys, monkeypatch):
    def compile_program(program):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of hbm by 3G\nand more")

    monkeypatch.setattr(plan, "compile_program", compile_program)
    assert not plan.report(toy_program, config, None)
    assert "RESOURCE_EXHAUSTED: out of hbm by 3G" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "says"),
    [("v5q:8x8", "unknown topology 'v5q:8x8'; .* v5p:8x8x4"), ("", "unknown topology ''")],
)
def test_an_unknown_topology_is_refused(name, says):
    with pytest.raises(UserError, match=says):
        plan.topology_devices(name)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mmmem_jax\[aot\]'"):
        plan.topology_devices("v5p:8x8x4")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("mesh.group", 3, "num_generations = 4 does not divide over the 3"),
        ("mesh.model", 3, "manager.hidden = 64 does not divide over the 3"),
        ("mesh.model", 9, "asks for 1 x 1 x 9 devices and there are 8"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(config, key, value, says):
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=says):
        plan.report(text_job.plan_manager, config, None)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: mmmem_jax[aot]")
def test_compiles_for_tpus_that_are_not_here(config, capsys):
    config.manager.update({"batch_size": 8, "num_rows": 8, "num_questions": 2, "hidden": 8})
    config.dim, config.sib.inner_epochs = 8, 1
    config.mesh.update({"data": -1, "group": 2, "model": 2})
    assert plan.report(text_job.plan_manager, config, "v5p:2x2x2")
    first, memory, total, *_ = capsys.readouterr().out.splitlines()
    assert first == "8 of 8 TPU v5: mesh data 2 x group 2 x model 2"
    assert total.endswith(" of 95 GB: fits")
    with pytest.raises(UserError, match="unknown topology 'v5p:3x3x3'"):
        plan.topology_devices("v5p:3x3x3")
