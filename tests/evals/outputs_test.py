"""The files of an evaluation."""

import json

from mmmem_jax.evals import outputs


def test_every_file_is_written_and_the_report_sees_the_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"phase": "manager", "step": 2, "reward": 0.5}\n')
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "curve.jsonl").write_text('{"step": 2, "accuracy": 0.25}\n')
    seen = []
    outputs.write_outputs(
        tmp_path,
        {"step": 2},
        iter([{"qid": 1}, {"qid": 2}]),
        write_report=lambda *x: seen.append(x),
        plot_summary=lambda *x: seen.append(x),
    )
    rows = (tmp_path / "eval" / "questions.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [{"qid": 1}, {"qid": 2}]
    assert json.loads((tmp_path / "eval" / "results.json").read_text()) == {"step": 2}
    (results, metrics, page), (same, picture) = seen
    assert results == same == {"step": 2}
    assert [row["phase"] for row in metrics] == ["manager", "held-out"]
    assert (page.name, picture.name) == ("report.html", "summary.png")
