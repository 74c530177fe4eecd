"""Whole runs on pictures from outside: what is learned, what is never looked at, what the files say."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import train
from data import augment, baselines, images, sample
from data.supply import Supply
from draw_folder import CLASSES, draw_folder
from model.runs import checkpoint
from model.runs.config import change
from rl import interventions
from rl.report import curves

ROOT = Path(train.__file__).parent
TINY = ["--preset=tiny", "--image-size=24", "--patch=12", "--vocab=400", "--clip-steps=2", "--align-steps=2",
        "--sft-steps=2", "--cot-steps=2", "--rl-steps=2", "--clip-batch=8", "--batch=8", "--micro-batch=4",
        "--save-every=1"]


class Witness:
    """Records which pictures are read while a stage trains, and while the run evaluates."""

    def __init__(self, patch):
        self.now, self.read = "loading", {}
        to_array, compare, start = sample.to_array, evaluation.compare, train.Run.start
        intervened = evaluation.intervened
        measure, taught = evaluation.measure_baselines, train.taught_tests

        def my_to_array(source, *rest):
            self.read.setdefault(self.now, set()).add(source if isinstance(source, str) else "not a file")
            return to_array(source, *rest)

        def my_compare(*args, **options):
            self.now = "evaluation"
            return compare(*args, **options)

        def my_intervened(*args):
            self.now = "interventions"      # which show pictures that are no files
            found = intervened(*args)
            self.now = "evaluation"
            return found

        def my_measure(*args):
            self.now = "baselines"
            found = measure(*args)
            self.now = "evaluation"
            return found

        def my_taught(run):
            self.now = "teacher"
            return taught(run)

        def my_start(run, stage):
            self.now = stage
            return start(run, stage)

        for module in (sample, augment, baselines, interventions):
            patch.setattr(module, "to_array", my_to_array)
        patch.setattr(evaluation, "measure_baselines", my_measure)
        patch.setattr(evaluation, "compare", my_compare)
        patch.setattr(evaluation, "intervened", my_intervened)
        patch.setattr(train, "taught_tests", my_taught)
        patch.setattr(train.Run, "start", my_start)
        patch.setattr(curves, "curves", lambda *_: b"none")        # takes longer than a short run


def paths(samples):
    return {picture for one in samples for picture in one.images}


def rows(out, name="results.json"):
    return json.loads((out / name).read_text())


def value(found, method, decoding, metric="accuracy"):
    [row] = [r for r in found if (r["method"], r["decoding"], r["metric"]) == (method, decoding, metric)]
    return row


def colours(folder, count=24, reasoning=False):
    """`count` small pictures, red or blue; every fourth is for validation. -> the jsonl file about them."""
    rng, lines = np.random.default_rng(0), []
    for n in range(count):
        colour = ("red", "blue")[n % 2]
        pixels = rng.integers(0, 90, (20, 30, 3), dtype=np.uint8)
        pixels[..., (0, 2)[n % 2]] += 160
        Image.fromarray(pixels).save(folder / f"{n}.png")
        lines.append({"image": f"{n}.png", "question": "What colour is it?", "answer": colour,
                      "aliases": [f"{colour}ish"], "split": "val" if n % 4 == 3 or n % 8 == 2 else "train"})
        if reasoning:
            lines[-1]["reasoning"] = f"most of it looks {colour}"
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "mine.jsonl"


@pytest.mark.parametrize("reasoning", [False, True])
def test_a_jsonl_file_goes_through_every_stage_with_and_without_reasoning(tmp_path, capsys, monkeypatch, reasoning):
    witness, path, out = Witness(monkeypatch), colours(tmp_path, reasoning=reasoning), tmp_path / "run"
    train.main([*TINY, f"--data=jsonl:{path}", f"--out={out}"])
    said = capsys.readouterr().out
    assert "jsonl: 24 lines about 24 pictures; 15 train, 9 val" in said
    assert ("15 with reasoning" in said or "24 with reasoning" in said) == reasoning

    stages = ("clip", "align", "sft", "cot", "rl", "cot_continued", "filtered")
    assert all((out / f"{stage}.pt").exists() for stage in stages)
    text = checkpoint.load(out / "cot.pt")["tokenizer"]
    assert (b"most" in text) == reasoning and (b"like" in text)         # the tokenizer knows the words of the chains
    found = rows(out)
    methods = ["cot", "cot_continued", "filtered", "grpo_token"]
    if not reasoning:                   # chains that data bring all end in the gold answer: no row of a teacher
        methods.append("teacher")
    assert {(r["method"], r["split"]) for r in found} == {(method, "val") for method in methods}
    assert {r["n"] for r in found if r["decoding"] == "greedy"} == {8}

    train_paths, val_paths = ({str(tmp_path / f"{n}.png") for n in range(24) if (n % 4 == 3 or n % 8 == 2) == is_val}
                              for is_val in (False, True))
    assert all(witness.read[stage] and witness.read[stage] <= train_paths for stage in stages)
    assert witness.read["evaluation"] and witness.read["evaluation"] <= val_paths
    assert witness.read.get("teacher", set()) == (set() if reasoning else val_paths)


def test_eval_asks_about_the_validation_pictures_of_the_data_a_checkpoint_was_trained_on(tmp_path, capsys):
    path, out = colours(tmp_path), tmp_path / "run"
    train.main([*TINY, f"--data=jsonl:{path}", "--stage=clip,align,cot", f"--out={out}"])
    capsys.readouterr()
    evaluation.main([f"--checkpoint={out / 'cot.pt'}", "--eval-greedy=8", "--eval-sampled=4", "--eval-samples=2"])
    part = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert part[1].split() == ["val"] and part[2].split()[:2] == [
        "cot", f"{value(rows(out), 'cot', 'greedy')['value']:.3f}"]


@pytest.mark.slow
def test_a_folder_of_pictures_goes_through_every_stage_and_validation_is_never_trained_on(tmp_path, monkeypatch):
    witness, out = Witness(monkeypatch), tmp_path / "run"
    draw_folder(tmp_path / "pictures", per_class=10, seed=1)
    train.main([*TINY, f"--data=images:{tmp_path / 'pictures'}", "--max-new=24", "--compare=all", f"--out={out}"])
    splits, _ = images.load(tmp_path / "pictures")
    for stage in change(train.Config(), compare="all").stages():
        assert (out / f"{stage}.pt").exists() and witness.read[stage] <= paths(splits["train"])
    assert len(witness.read["clip"]) == 16 and witness.read["evaluation"] <= paths(splits["val"])
    assert {r["method"] for r in rows(out)} == {
        "teacher", "before_rl_zero", "cot", "grpo_token", "cot_continued", "filtered", "rejection", "sft_direct",
        "perfect", "grpo_token_zero"}
    direct = value(rows(out, "baselines.json"), "sft_direct, no thinking", "greedy", "baseline")
    assert direct["value"] == value(rows(out), "sft_direct", "greedy")["value"]


def red_and_blue(folder):
    """Eight red and eight blue pictures to train on and four to test, in class folders."""
    rng = np.random.default_rng(0)
    for n in range(24):
        pixels = rng.integers(0, 90, (20, 30, 3), dtype=np.uint8)
        pixels[..., (0, 2)[n % 2]] += 160
        place = folder / ("train" if n < 16 else "val") / ("red", "blue")[n % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{n}.png")
    return f"--data=images:{folder}"


def test_a_run_of_few_shots_sees_no_other_training_picture_and_stands_beside_its_baselines(
        tmp_path, capsys, monkeypatch):
    data, out = red_and_blue(tmp_path / "pictures"), tmp_path / "run"
    witness = Witness(monkeypatch)
    load_vlm, loaded = evaluation.load_vlm, []

    def my_load_vlm(path, *rest):
        if witness.now == "baselines":
            loaded.append(Path(path).name)
        return load_vlm(path, *rest)
    monkeypatch.setattr(evaluation, "load_vlm", my_load_vlm)
    train.main([*TINY, data, "--shots=2", "--augment=flip,crop,colour", "--stage=clip,align,sft,cot", f"--out={out}"])
    said = capsys.readouterr().out
    splits, _ = images.load(tmp_path / "pictures")
    seen = witness.read["clip"] - {"not a file"}
    assert len(seen) == 4 and seen < paths(splits["train"]) and "--shots=2: 4 of 16 to train on" in said
    assert all(witness.read[stage] == seen for stage in ("align", "sft", "cot"))
    assert witness.read["evaluation"] == witness.read["teacher"] == paths(splits["val"])
    assert witness.read["baselines"] == seen | paths(splits["val"])

    assert loaded == ["cot.pt", "sft.pt"]       # features and towers; who answers without thinking
    found = {row["method"]: row for row in rows(out, "baselines.json")}
    assert [*found] == ["majority class", "nearest pixels", "linear probe", "zero-shot CLIP", "sft, no thinking"]
    assert all(row["n"] == 8 and row["split"] == "val" for row in found.values())
    assert found["majority class"]["value"] == 0.5 and found["nearest pixels"]["value"] == 1.0
    assert "Baselines, accuracy on the prompts of greedy decoding" in said and "nearest pixels" in said
    evaluation.main([f"--checkpoint={out / 'sft.pt'}", "--eval-greedy=8", "--eval-sampled=4", "--eval-samples=2"])
    greedy = capsys.readouterr().out.splitlines()[2].split()
    assert greedy[:2] == ["sft", f"{found['sft, no thinking']['value']:.3f}"]


def test_a_killed_and_resumed_clip_sees_the_same_changed_pictures(tmp_path, monkeypatch):
    flags = [*TINY, red_and_blue(tmp_path / "pictures"), "--augment=crop,colour", "--clip-steps=4", "--stage=clip"]
    train.main([*flags, f"--out={tmp_path / 'whole'}"])
    train.main([*(flag for flag in flags if "augment" not in flag), f"--out={tmp_path / 'plain'}"])
    augmented = augment.augmented
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return augmented(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "augmented", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, f"--out={tmp_path / 'killed'}"])
    assert len({seed for _, _, _, seed, *_ in calls}) == 3
    train.main(["--resume", f"--out={tmp_path / 'killed'}"])
    found = {name: checkpoint.load(tmp_path / name / "clip.pt")["clip"] for name in ("whole", "plain", "killed")}
    whole, plain, resumed = found["whole"], found["plain"], found["killed"]
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert any((whole[name] != plain[name]).any() for name in whole)


def test_the_test_above_would_see_a_validation_picture_in_training(tmp_path, monkeypatch):
    witness, path = Witness(monkeypatch), colours(tmp_path)
    samples = Supply.samples

    def leaky(self, what, *rest, **options):
        return self.real["val"] if what == "sft" else samples(self, what, *rest, **options)
    monkeypatch.setattr(Supply, "samples", leaky)
    train.main([*TINY, f"--data=jsonl:{path}", "--stage=clip,align,sft", f"--out={tmp_path / 'run'}"])
    assert str(tmp_path / "3.png") in witness.read["sft"] and str(tmp_path / "3.png") not in witness.read["align"]


@pytest.mark.slow
def test_a_folder_of_pictures_is_learned_with_the_default_settings_and_rl_loses_nothing(tmp_path):
    pictures, out = draw_folder(tmp_path / "pictures", per_class=80), tmp_path / "run"
    # As a person runs it, but for the record of what is read.
    program = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import pytest, train
from test_real_run import Witness
with pytest.MonkeyPatch.context() as patch:
    witness = Witness(patch)
    train.main(["--data=images:{pictures}", "--threads=1", "--out={out}"])
    with open({str(tmp_path / 'read.json')!r}, "w") as file:
        json.dump({{stage: sorted(read) for stage, read in witness.read.items()}}, file)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"images: 480 pictures, 6 classes; \d+ train, \d+ val", done.stdout)

    splits, _ = images.load(pictures)
    read = json.loads((tmp_path / "read.json").read_text())
    assert set(read) >= {"clip", "align", "sft", "cot", "rl", "cot_continued", "filtered", "evaluation"}
    assert {*read.pop("baselines")} == paths(splits["train"] + splits["val"])
    assert {*read.pop("interventions")} <= paths(splits["val"]) | {"not a file"}
    for stage, found in read.items():
        assert set(found) <= paths(splits["val" if stage in ("evaluation", "teacher") else "train"]), stage
    assert set(read["clip"]) == paths(splits["train"]) and set(read["evaluation"]) == paths(splits["val"])

    found, guess = rows(out), 1 / len(CLASSES)
    for method in ("cot", "grpo_token"):
        assert value(found, method, "t1")["low"] > 1.5 * guess and value(found, method, "greedy")["low"] > 1.5 * guess
    assert value(rows(out, "differences.json"), "cot", "t1", "accuracy - grpo_token")["high"] < 0.05
    log = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if line["stage"] == "rl"]
    assert np.mean([line["flat"] for line in log]) < 0.9
