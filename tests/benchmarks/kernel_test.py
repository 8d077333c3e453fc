import argparse
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernel
from mmmem_jax.kernels.retrieval_entropy import api, mosaic_gpu, xla


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(kernel.SIZES, "tiny", ((64, 200), (16,), (1, 3), (5,)))
    monkeypatch.setattr(kernel, "limits", lambda _: {"copy_gb_s": 1.0, "matmul_tflops": 1.0})
    monkeypatch.setattr(kernel, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(kernel, "RESULTS", tmp_path / "results")
    medians = kernel.medians_us
    monkeypatch.setattr(
        kernel, "medians_us", lambda *args: medians(*args, batch_seconds=1e-4, repeats=1)
    )
    return argparse.Namespace(sizes="tiny", seconds=1e9, compile_torch=False)


def test_every_size_is_a_row_and_what_others_take_is_beside_it(tiny):
    result = kernel.measure(tiny)
    sizes = [(r["keys"], r["queries"]) for r in result["rows"]]
    assert sizes == [(64, 1), (64, 3), (200, 1), (200, 3)]
    for row in result["rows"]:
        assert row["microseconds"]["xla"] > 0
        assert row["others_microseconds"]["naive"] > 0
        assert row["bytes"] == row["keys"] * 16 * 4
        assert row["fastest"] == "xla"
    assert 0 <= result["slower_than_xla"] <= 4
    assert "4000000 keys of 1024" in result["unmeasured"]


def test_after_the_time_given_no_size_is_begun(tiny, monkeypatch):
    tiny.seconds = 0.0
    assert kernel.measure(tiny)["rows"] == []


def test_the_choice_reads_the_table_written(tiny, monkeypatch):
    row = {"queries": 1, "keys": 4096, "dim": 128, "top_k": 5, "dtype": "bfloat16"}
    row["microseconds"] = {"xla": 2.0, "mosaic_gpu": 1.0}
    other = {"device": "another", "keys": 7}
    kernel.TABLE.write_text(json.dumps({"devices": {"another": {}}, "rows": [other]}))
    for _ in range(2):  # the second time in place of the first
        kernel.write_table({"versions": {}, "date": "today", "rows": [row]})
    table = json.loads(kernel.TABLE.read_text())
    assert set(table["devices"]) == {"another", jax.devices()[0].device_kind}
    assert [r["keys"] for r in table["rows"]] == [7, 4096]
    monkeypatch.setattr(api, "measurements", lambda: table["rows"][1:])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(mosaic_gpu, "runs_here", lambda: True)
    bank = xla.Bank(jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16))
    assert api.choose((1, 128), bank, 5) == "mosaic_gpu"
