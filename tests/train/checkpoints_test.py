"""Tests of mmmem_jax/train/checkpoints.py: whole or not at all, in the run's own folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmmem_jax.errors import UserError
from mmmem_jax.train import checkpoints

CONFIG = {"seed": 0, "manager": {"hidden": 8, "slots": (1, 2)}}
DATA = {"next": 0}


def state_at(step: int) -> dict:
    return {"w": jnp.arange(3.0) * step, "rng": jax.random.key_data(jax.random.key(step))}


@pytest.fixture
def saved(tmp_path):
    found = checkpoints.open_checkpoints(tmp_path / "phase")
    yield found
    found.close()


def test_loads_what_was_saved(saved, tmp_path):
    for step in (1, 2):
        checkpoints.save(saved, step, state_at(step), {"next": step}, CONFIG)
    saved.close()
    for asked, step in ((None, 2), (1, 1)):
        state, data, at = checkpoints.load(tmp_path / "phase", state_at(0), asked)
        assert (data, at) == ({"next": step}, step)
        jax.tree.map(np.testing.assert_array_equal, state, state_at(step))


def test_keeps_the_newest(saved, tmp_path):
    for step in (1, 2, 3):
        checkpoints.save(saved, step, state_at(step), DATA, CONFIG)
    saved.close()
    assert checkpoints.steps(tmp_path / "phase") == [2, 3]


def test_keeps_the_best_too(tmp_path):
    folder = tmp_path / "phase"
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.1), (5, None), (6, 0.2)):
        saved = checkpoints.open_checkpoints(folder)  # also of a run that went on
        checkpoints.save(saved, step, state_at(step), DATA, CONFIG, score)
        saved.close()
    assert checkpoints.steps(folder) == [3, 5, 6]
    assert checkpoints.best(folder) == 3
    assert checkpoints.newest(folder) == 6


def test_a_process_that_does_not_share_the_workdir_is_told(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.distributed, "from_first", lambda value: 3)
    with pytest.raises(UserError, match="does not find step 3 of process 0 .* that they share"):
        checkpoints.newest(tmp_path / "phase")


def test_without_scores_none_is_best(saved, tmp_path):
    checkpoints.save(saved, 1, state_at(1), DATA, CONFIG)
    saved.close()
    assert checkpoints.best(tmp_path / "phase") is None


def test_what_is_saved_may_be_given_away(saved, tmp_path):
    """Saves go on in the background: what an update makes of the buffers must not be in them."""
    update = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros((64, 4096))
    for step in range(4):
        checkpoints.save(saved, step, {"w": w}, DATA, CONFIG)
        for _ in range(3):
            w = update(w)
    saved.close()
    assert checkpoints.steps(tmp_path / "phase") == [2, 3]
    for step in (2, 3):
        state, _, _ = checkpoints.load(tmp_path / "phase", {"w": w}, step)
        np.testing.assert_array_equal(state["w"], np.full((64, 4096), 3.0 * step))


def test_an_empty_folder_has_none(saved, tmp_path):
    assert checkpoints.load(tmp_path / "phase", state_at(0)) is None
    assert checkpoints.steps(tmp_path / "phase") == checkpoints.steps(tmp_path / "absent") == []


def test_a_half_written_checkpoint_is_ignored(saved, tmp_path):
    checkpoints.save(saved, 1, state_at(1), DATA, CONFIG)
    saved.close()
    half = next((tmp_path / "phase").glob("1")).with_name("2.orbax-checkpoint-tmp")
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(b"cut")
    assert checkpoints.steps(tmp_path / "phase") == [1]
    again = checkpoints.open_checkpoints(tmp_path / "phase")
    assert checkpoints.load(tmp_path / "phase", state_at(0))[2] == 1
    checkpoints.save(again, 2, state_at(2), DATA, CONFIG)
    again.close()
    assert checkpoints.steps(tmp_path / "phase") == [1, 2]


def test_a_step_folder_that_was_never_committed_is_ignored(saved, tmp_path):
    checkpoints.save(saved, 1, state_at(1), DATA, CONFIG)
    saved.close()
    (tmp_path / "phase" / "2").mkdir()
    again = checkpoints.open_checkpoints(tmp_path / "phase")
    assert checkpoints.load(tmp_path / "phase", state_at(0))[2] == 1
    again.close()


def test_a_workdir_takes_its_own_config_again(tmp_path):
    checkpoints.claim_workdir(tmp_path / "run", CONFIG)
    checkpoints.claim_workdir(tmp_path / "run", CONFIG)
    assert checkpoints.read_config(tmp_path / "run")["manager"] == {"hidden": 8, "slots": [1, 2]}
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (CONFIG | {"seed": 1}, "seed: 0 there, 1 here"),
        (CONFIG | {"dim": 64}, "dim: unset there, 64 here"),
        ({"seed": 0, "manager": {"hidden": 9, "slots": (1, 2)}}, "manager.hidden: 8 there, 9 here"),
    ],
)
def test_refuses_the_workdir_of_another_config(tmp_path, other, difference):
    checkpoints.claim_workdir(tmp_path, CONFIG)
    with pytest.raises(UserError, match=difference):
        checkpoints.claim_workdir(tmp_path, other)
    assert checkpoints.read_config(tmp_path)["seed"] == 0


def test_checking_makes_no_workdir(tmp_path):
    checkpoints.check_workdir(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()
    checkpoints.claim_workdir(tmp_path / "run", CONFIG)
    checkpoints.check_workdir(tmp_path / "run", CONFIG)
    with pytest.raises(UserError, match="seed: 0 there, 1 here"):
        checkpoints.check_workdir(tmp_path / "run", CONFIG | {"seed": 1})


def test_says_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        checkpoints.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match="not JSON"):
        checkpoints.read_config(tmp_path)


def test_a_run_from_before_meshes_had_a_model_axis_is_of_the_same_config(tmp_path):
    older, newer = {"mesh": {"data": 2, "group": 1}}, {"mesh": {"data": 2, "group": 1, "model": 1}}
    checkpoints.claim_workdir(tmp_path, older)
    assert checkpoints.read_config(tmp_path) == newer
    checkpoints.check_workdir(tmp_path, newer)
    newer["mesh"]["model"] = 2
    with pytest.raises(UserError, match="mesh.model: 1 there, 2 here"):
        checkpoints.check_workdir(tmp_path, newer)
