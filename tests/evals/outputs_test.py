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


def test_no_file_has_a_bare_nan(tmp_path):
    nan, inf = float("nan"), float("inf")
    (tmp_path / "eval").mkdir()
    outputs.write_outputs(
        tmp_path,
        {"a": nan, "b": [1.5, {"c": -inf}], "d": (nan, "NaN of text", True, 2)},
        iter([{"age": nan, "qid": 1}]),
        write_report=lambda *x: None,
        plot_summary=lambda *x: None,
    )

    def strict(text):
        def refuse(constant):
            raise AssertionError(constant)

        return json.loads(text, parse_constant=refuse)

    results = strict((tmp_path / "eval" / "results.json").read_text())
    assert results == {"a": None, "b": [1.5, {"c": None}], "d": [None, "NaN of text", True, 2]}
    row = strict((tmp_path / "eval" / "questions.jsonl").read_text())
    assert row == {"age": None, "qid": 1}
