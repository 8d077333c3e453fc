"""The evaluation of a world run, what of it needs no trained one.

The rest is tested in tests/eval_main_test.py.
"""

import pytest

from configs import sib_grpo
from mmmem_jax.evals import protocol, world_eval
from mmmem_jax.evals.protocol import Policy
from mmmem_jax.train import world_job


@pytest.mark.parametrize("name", ["uniform", "uniform_merge", "keep_recent"])
def test_the_best_rule_is_built_for_each_number_of_slots(tmp_path, monkeypatch, name):
    config = sib_grpo.get_config()
    run = world_eval.Run(config, None, None, [], None)
    (tmp_path / "eval").mkdir()
    constants = '{"similarity": 0.5, "surprise_change": 0.5, "half_life": 1.0}'
    (tmp_path / "eval" / "rules.json").write_text(constants)
    monkeypatch.setattr(world_eval, "evaluate", lambda run, policy: policy)

    def summarise(name, policy, streams):
        cut = int(policy.params["num_slots"]) if policy.params else None
        return dict.fromkeys(("tokens", "accuracy", "se"), cut)

    monkeypatch.setattr(protocol, "summarise", summarise)
    base = world_job.memory_config(config)
    learned = Policy("learned", None, None, base)
    entries = [{"name": "learned", "accuracy": 0.9}, {"name": name, "accuracy": 0.5}]
    points = world_eval.frontier(run, tmp_path, learned, entries)
    budgets = sorted({*config.eval.slots, base.episodic_slots})
    assert len(budgets) > 1
    assert [(p["policy"], p["slots"]) for p in points] == [
        (policy, slots) for slots in budgets for policy in ("learned", name)
    ]
    built_for = [p["tokens"] for p in points if p["policy"] == name]
    assert built_for == ([1] * len(budgets) if name == "keep_recent" else budgets)
