"""The joint report of several seeds, from files written by hand."""
import json

import pytest

from rl.report.seeds import report_seeds


def row(method, value, metric="accuracy", split="id", decoding="t1", seed=0):
    return dict(method=method, split=split, decoding=decoding, metric=metric, value=value, low=0.0, high=1.0, n=9,
                seed=seed)


def leave(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(rows))


@pytest.fixture
def runs(tmp_path):
    """Two finished runs: grpo is right on .4 and .6, cot on .05 and .15 less."""
    for seed, value, less in ((3, 0.4, 0.05), (4, 0.6, 0.15)):
        run = tmp_path / f"seed-{seed}"
        leave(run, "results.json", [row("cot", value - less, seed=seed), row("grpo", value, seed=seed)])
        leave(run, "differences.json", [row("cot", -less, "accuracy - grpo", seed=seed)])
        leave(run, "kinds.json", [row("cot", value, "accuracy on at", seed=seed),
                                  row("cot", value, "accuracy on at", decoding="greedy", seed=seed)])
        leave(run, "training.json", [])
        leave(run, "probe.json", dict(id=value, pairs=0.5))
        (run / "log.jsonl").write_text(json.dumps(dict(stage="cot", step=0, loss=value)) + "\n")
    return tmp_path


def report(folder, seeds=(3, 4)):
    """-> (the text, what was written by name, in that order)."""
    written = {}

    def write(path, data):
        written[path.name] = data
        assert path.parent == folder

    return report_seeds(folder, seeds, write), written


def test_the_rows_of_all_seeds_are_joined_and_results_written_after_the_other_rows(runs):
    _, written = report(runs)
    names = ["training.json", "kinds.json", "differences.json", "results.json"]
    assert [name for name in written if name not in ("curves.png", "report.html")] == names
    for name in names:
        of_each = [json.loads((runs / f"seed-{seed}" / name).read_text()) for seed in (3, 4)]
        assert json.loads(written[name]) == of_each[0] + of_each[1]


def test_the_curves_are_a_picture_of_the_means(runs, monkeypatch):
    seen = []
    monkeypatch.setattr("rl.report.seeds.curves", lambda log, rows: seen.append((log, rows)))
    _, written = report(runs)
    assert "curves.png" not in written          # without matplotlib there is none
    [(log, rows)] = seen
    assert log == [dict(stage="cot", step=0, loss=0.5)]
    assert {row["method"]: row["value"] for row in rows} == pytest.approx(dict(cot=0.4, grpo=0.5))


def test_the_text_is_the_result_the_probes_and_the_tables(runs):
    text, _ = report(runs)
    head, *tables = text.split("\n\n")
    first, second, third, probes = head.splitlines()
    assert first.startswith("Result on id, T = 1 [95 % interval over 2 seeds]: grpo is right on 0.500 [")
    # t of one degree 12.706, times a deviation of .0707 / sqrt(2)
    assert "cot minus grpo, paired by prompt, -10.0 points [-73.5, +53.5], an interval that includes 0." in second
    assert third == "Form and length were not measured."
    assert probes == "probe of the features that W reads, seed by seed: id 0.400, pairs 0.500; id 0.600, pairs 0.500"
    titles = [table.splitlines()[0] for table in tables]
    assert titles[::2] == [f"{metric}, T = 1: mean over 2 seeds [95 % t-interval over seeds] sd"
                           for metric in ("accuracy", "accuracy on at")]
    assert titles[1] == ("accuracy - grpo, T = 1, in points: mean over 2 seeds [95 % paired t-interval over seeds], p "
                         "after Holm's correction over these 1 comparisons, * below .05")


def test_what_only_some_runs_have_is_left_out(runs):
    (runs / "seed-4/probe.json").unlink()
    for seed in (3, 4):
        (runs / f"seed-{seed}/kinds.json").unlink()
    text, written = report(runs)
    assert "shape probe" not in text and "accuracy on at" not in text and "kinds.json" not in written


def test_seeds_that_evaluated_nothing_have_rows_but_no_report(runs):
    for seed in (3, 4):
        leave(runs / f"seed-{seed}", "results.json", [])
    text, written = report(runs)
    assert text == "" and json.loads(written["results.json"]) == [] and "curves.png" not in written
    assert "report.html" not in written


def test_curves_without_a_point_are_no_picture(runs):
    for seed in (3, 4):
        leave(runs / f"seed-{seed}", "curve.json", [])
    text, written = report(runs)
    assert text and "frontier.png" not in written and json.loads(written["curve.json"]) == []


def test_one_seed_alone_has_no_interval(runs):
    text, _ = report(runs, [4])
    first, second, *_ = text.splitlines()
    assert first == ("Result on id, T = 1 [95 % interval over 1 seed]: grpo is right on 0.600; cot, imitation alone, "
                     "on 0.450.")
    assert second.endswith("-15.0 points, without an interval.")


def test_baselines_have_a_table_of_their_own_over_the_seeds(runs):
    for seed, value in ((3, 0.2), (4, 0.4)):
        leave(runs / f"seed-{seed}", "baselines.json", [row("linear probe", value, "baseline", "val", "greedy", seed)])
    text, written = report(runs)
    assert len(json.loads(written["baselines.json"])) == 2
    [table] = [part for part in text.split("\n\n") if part.startswith("baseline, greedy: mean over 2 seeds")]
    assert table.splitlines()[2].split()[:3] == ["linear", "probe", "0.300"]


def test_verdicts_are_counted_over_the_seeds(runs):
    for seed, finding in ((3, "sharpening"), (4, "not shown")):
        leave(runs / f"seed-{seed}", "verdicts.json",
              [dict(question="sharpening", split="id", finding=finding, sentence="", seed=seed, method="grpo",
                    start="cot", measures={"pass@1": dict(value=seed / 10, low=0, high=1, n=9, is_difference=True)})])
    text, written = report(runs)
    assert len(json.loads(written["verdicts.json"])) == 2
    page = written["report.html"].decode()
    assert "interval over 2 seeds]: grpo is right on 0.500" in page and "sharpening 1, not shown 1" in page
    assert "\n  sharpening, id: sharpening 1, not shown 1. grpo less cot: pass@1 +35.0\n" in text
    assert "pass@1 +35.0" in page
