"""An ablation grid: how it is read, which stages its cells share, what its table says, and what a kill changes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from model.runs.config import change
from model.runs.grid import group_of, name_of, planned, read_cells
from model.runs.seeds import run_all
from rl import algorithms
from rl.report.grid import (accuracies_of, collect, comparisons, differences_to_first, effects, grid_page, grid_text,
                            is_shown)

ROOT = Path(__file__).resolve().parents[1]
CELLS = [dict(norm=norm, kl_coef=kl_coef) for norm in ("token", "sequence") for kl_coef in (0.0, 0.04)]
NAMES = [name_of(cell) for cell in CELLS]


# ---------------------------------------------------------------- reading and planning

def test_every_combination_is_a_cell_the_last_option_fastest():
    assert read_cells(train.Config(), "norm=token,sequence;kl_coef=0,0.04") == CELLS
    assert NAMES == ["norm=token, kl_coef=0", "norm=token, kl_coef=0.04", "norm=sequence, kl_coef=0",
                     "norm=sequence, kl_coef=0.04"]
    assert read_cells(train.Config(), "--rl-lr=1e-3") == [dict(rl_lr=1e-3)]
    assert read_cells(train.Config(), "rewards=correctness:1,format:0.1|correctness:1") == [
        dict(rewards="correctness:1,format:0.1"), dict(rewards="correctness:1")]
    assert group_of(train.Config, "kl_coef") == "algorithm"


@pytest.mark.parametrize("text, said", [
    ("norm", "must hold NAME=VALUE,VALUE;..: 'norm' is none"), ("norm=", "'norm=' is none"),
    ("norn=token", "must name options of train.py; 'norn' is none"), ("seed=1,2", "'seed' is none"),
    ("threads=1,2", "must name options that a cell may set; 'threads' is none"), ("shard=none,full", "'shard' is none"),
    ("norm=token;norm=group", "must hold the values of norm once"), ("norm=token,token", "each value of norm once"),
    ("kl_coef=much", "--kl-coef=much must be a number"), ("", "'' is none")])
def test_what_is_no_grid_is_one_sentence(text, said):
    with pytest.raises(ValueError) as caught:
        read_cells(train.Config(), text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def plan_of(text, stages=("clip", "align", "sft", "cot", "rl"), seeds=(5, 6), **options):
    cfg = change(train.Config(), threads=1, jobs=2, seeds=2, grid=text, **options)
    cells = read_cells(cfg, text)
    return planned(cfg, cells, seeds, list(stages), lambda option: train.first_touched(list(stages), option),
                   algorithms.of_flags, Path("out/g"))


def test_cells_share_the_stages_before_the_first_that_an_option_touches():
    plan = plan_of("norm=token,sequence;kl_coef=0,0.04")
    assert [*plan.shared] == ["shared-seed-5", "shared-seed-6"] and len(plan.cells) == 8
    shared = plan.shared["shared-seed-6"]
    assert (shared.run.stage, shared.run.seed, shared.run.grid, shared.run.seeds, shared.run.jobs) == (
        "clip,align,sft,cot", 6, "", 0, 1)
    cell = plan.cells["cell-3-seed-6"]
    assert (cell.run.stage, cell.run.init) == ("rl", "out/g/shared-seed-6/cot.pt")
    assert (cell.algorithm.norm, cell.algorithm.kl_coef, cell.run.seed) == ("sequence", 0.0, 6)
    assert plan.at["cell-3-seed-6"] == (2, 6) and shared.algorithm == train.Config().algorithm


@pytest.mark.parametrize("option, shared", [
    ("norm=token", "clip,align,sft,cot"), ("group=4,8", "clip,align,sft,cot"), ("gated=True", "clip,align,sft,cot"),
    ("cot_lr=1e-3", "clip,align,sft"), ("sft_steps=10,20", "clip,align"), ("align_lr=1e-3", "clip"), ("width=64", ""),
    ("max_new=24", ""), ("slip=0.1", ""), ("norm=token;cot_steps=10", "clip,align,sft")])
def test_what_an_option_touches_is_not_shared(option, shared):
    plan = plan_of(option, seeds=(5,))
    found = [cfg.run.stage for cfg in plan.shared.values()]
    assert found == ([shared] if shared else [])
    if not shared:
        assert plan.cells["cell-1-seed-5"].run.init == "" and plan.cells["cell-1-seed-5"].run.stage == "all"


def test_an_option_of_reinforcement_learning_needs_a_stage_of_it():
    with pytest.raises(ValueError, match="--grid=kl_coef must come with a stage of reinforcement learning"):
        train.first_touched(["clip", "align", "cot"], "kl_coef")


def test_an_algorithm_brings_its_switches_but_for_flags_that_were_given():
    plan = plan_of("algorithm=grpo,dr_grpo", flags="kl_coef", kl_coef=0.5, seeds=(0,))
    grpo, dr_grpo = plan.cells.values()
    assert grpo.algorithm.norm == algorithms.ALGORITHMS["grpo"].norm != dr_grpo.algorithm.norm
    assert grpo.algorithm.kl_coef == dr_grpo.algorithm.kl_coef == 0.5
    assert grpo.run.flags == "algorithm kl_coef"
    assert [train.counted(cfg) for cfg in (grpo, dr_grpo)] == ["grpo[kl_coef=0.5]", "dr_grpo[kl_coef=0.5]"]
    assert train.counted(change(train.Config(), stage="clip,align,cot")) == "cot"


def test_a_run_that_fails_ends_the_others_and_is_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('the reason')\nsys.exit(3)\n")
    with pytest.raises(ValueError, match="cell-1 stopped with exit code 3, saying 'the reason'"):
        run_all(str(script), {"cell-1": train.Config()}, 1, tmp_path)


def test_runs_with_results_are_not_run_again(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/results.json").write_text("[]")
    assert train.unfinished({"a": 1, "b": 2}, tmp_path) == {"b": 2}


# ---------------------------------------------------------------- the table

def made_up(effect, spread=0.01, seeds=5, seed=0):
    """Rows of a grid whose truth is known: a start that differs by seed, and what each cell adds to it."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(seeds):
        base = 0.5 + 0.1 * rng.standard_normal()
        for name, cell in zip(NAMES, CELLS):
            for split in ("id", "crowded"):
                value = base + effect(cell) + spread * rng.standard_normal()
                rows.append(dict(method=name, split=split, decoding="t1", metric="accuracy", value=value, low=0.0,
                                 high=1.0, n=200, seed=number))
    return rows


def of_norm(cell):
    return 0.1 if cell["norm"] == "sequence" else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_an_effect_is_found_and_none_is_not(seed):
    found = effects(made_up(of_norm, seed=seed), CELLS, NAMES, "t1")
    assert {place for place, one in found.items() if one.p < 0.01} >= {("norm=sequence", "id"),
                                                                       ("norm=sequence", "crowded")}
    assert abs(found["norm=sequence", "id"].mean - 0.1) < 0.02
    assert abs(found["kl_coef=0.04", "id"].mean) < 0.02
    text = grid_text(made_up(of_norm, seed=seed), CELLS, NAMES)
    assert "the largest of its kind" in text and "Multiple comparisons: 6 comparisons, corrected together" in text


def test_nothing_is_called_not_shown():
    text = grid_text(made_up(lambda cell: 0.0, spread=0.02, seed=1), CELLS, NAMES)
    first, second, *_ = text.splitlines()
    assert first.endswith("not shown.") or f"the best is {NAMES[0]}" in first
    assert second == f"0 of 6 differences to {NAMES[0]} have an interval without 0, before any correction."


def test_differences_are_paired_by_seed_by_hand():
    rows = [dict(method=name, split="id", decoding="t1", metric="accuracy", value=value, n=9, seed=seed)
            for name, values in zip(NAMES, ((0.1, 0.5), (0.2, 0.6), (0.1, 0.7), (0.4, 0.8)))
            for seed, value in enumerate(values)]
    found = differences_to_first(rows, NAMES, "t1")
    assert [round(one.mean, 6) for one in found.values()] == [0.1, 0.1, 0.3]
    assert np.isnan(found[NAMES[1], "id"].p) and not is_shown(found[NAMES[1], "id"])     # the same with every seed
    both = effects(rows, CELLS, NAMES, "t1")
    # seed by seed: norm ((.1 - .1) + (.4 - .2)) / 2 and ((.7 - .5) + (.8 - .6)) / 2; kl (.1 + .3) / 2 and (.1 + .1) / 2
    assert both["norm=sequence", "id"].mean == pytest.approx((0.1 + 0.2) / 2)
    assert both["kl_coef=0.04", "id"].mean == pytest.approx((0.2 + 0.1) / 2)
    assert effects(rows[:4], CELLS[:2], NAMES[:2], "t1") == {}          # one option alone: the table of cells has it


def test_a_cell_without_a_seed_is_not_compared():
    rows = [row for row in made_up(of_norm) if (row["method"], row["seed"]) != (NAMES[1], 0)]
    assert (NAMES[1], "id") not in differences_to_first(rows, NAMES, "t1")
    assert (NAMES[2], "id") in differences_to_first(rows, NAMES, "t1")


def test_one_seed_has_values_and_no_interval_and_no_evaluation_is_said():
    rows = made_up(of_norm, seeds=1)
    assert all(row["low"] is None for row in accuracies_of(rows, "t1"))
    text = grid_text(rows, CELLS, NAMES)
    assert "Multiple comparisons" not in text and "not shown" in text and "inf" not in text
    assert comparisons({}) == "" and grid_text([], CELLS, NAMES).startswith("Nothing was evaluated")


def test_the_rows_that_count_are_those_of_the_ablated_method(tmp_path):
    (tmp_path / "cell-1-seed-0").mkdir()
    rows = [dict(method=name, value=1) for name in ("before", "grpo[kl_coef=0.1]", "grpo")]
    (tmp_path / "cell-1-seed-0/results.json").write_text(json.dumps(rows))
    assert collect(tmp_path, {"cell-1-seed-0": ("kl_coef=0.1", 0, "grpo[kl_coef=0.1]")}) == [
        dict(method="kl_coef=0.1", value=1)]


def test_the_page_has_a_picture_of_differences_and_a_curve_a_cell(tmp_path):
    for number in range(len(CELLS)):
        folder = tmp_path / f"cell-{number + 1}-seed-0"
        folder.mkdir()
        lines = [{"stage": "rl", "method": "grpo", "step": step, "reward": 0.1 * step} for step in range(3)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = grid_page("g", tmp_path, made_up(of_norm), CELLS, NAMES).decode()
    assert f"Points more than {NAMES[0]}" in html
    assert f"{NAMES[2]} on id: +" in html and "norm=sequence on id: +" in html
    assert html.count("<title>norm=token, kl_coef=0.04</title>") == 1
    assert b"Nothing was evaluated" in grid_page("g", tmp_path, [], CELLS, NAMES)


# ---------------------------------------------------------------- killed and resumed

TINY = ["--preset=tiny", "--clip-steps=2", "--align-steps=2", "--sft-steps=0", "--cot-steps=20", "--cot-lr=1e-2",
        "--forget-close=0.5", "--gated=False", "--rl-steps=3", "--pictures=64", "--traces=64", "--rl-prompts=16",
        "--max-new=24", "--eval-greedy=2", "--eval-sampled=20", "--threads=1", "--jobs=2"]


def command(*argv):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.mark.slow
def test_a_grid_killed_and_resumed_has_the_same_table(tmp_path):
    # SEETHINK_SEEDS=3: over as many seeds.
    asked = [*TINY, f"--seeds={os.environ.get('SEETHINK_SEEDS', 2)}", "--grid=norm=token,sequence;kl_coef=0,0.5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = command(*asked, f"--out={whole}")
    said = run.communicate()[0]
    assert run.returncode == 0, said[-2000:]
    table = said[said.index("Result on id"):said.index("Multiple comparisons")]
    rows = (whole / "results.json").read_bytes()
    assert {row["method"] for row in json.loads(rows)} == {"norm=token, kl_coef=0", "norm=token, kl_coef=0.5",
                                                           "norm=sequence, kl_coef=0", "norm=sequence, kl_coef=0.5"}
    assert (whole / "report.html").stat().st_size > 10000

    # Killed while stages are shared, while cells train, and once more, each time with all of its processes.
    for place in ("shared-seed-1/clip.pt", "cell-2-seed-0/log.jsonl", "cell-1-seed-1/rl.pt"):
        resume = ["--resume"] if (broken / "config.json").exists() else asked
        run = command(*resume, f"--out={broken}")
        while not (broken / place).exists():
            assert run.poll() is None, run.communicate()[0][-2000:]
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert not (broken / "results.json").exists()
    run = command("--resume", f"--out={broken}")
    said = run.communicate()[0]
    assert run.returncode == 0, said[-2000:]
    assert table in said and (broken / "results.json").read_bytes() == rows
    assert "cell-1-seed-0 done" not in said             # which had its results before
