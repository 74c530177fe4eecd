"""What a person may get wrong on the command line, in the data and on the disk: one sentence, and nothing is lost."""
import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import eval as evaluation
import train
from draw_folder import draw_folder
from model import memory
from model.runs import checkpoint
from model.runs.config import change, comments, flag, from_command_line, inside, options, to_command_line
from model.runs.device import pick_device
from model.runs.folder import RunFolder
from rl.report import curves

ROOT = Path(train.__file__).parent
SMALL = ["--preset=tiny", "--patch=24", "--clip-steps=1", "--align-steps=1", "--sft-steps=0", "--cot-steps=1",
         "--rl-steps=1", "--pictures=8", "--questions=8", "--traces=8", "--rl-prompts=8", "--clip-batch=4", "--batch=4",
         "--eval-greedy=1", "--eval-sampled=1", "--save-every=1"]


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    """They take longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "curves", lambda *_: b"none")
        yield


def parse(*argv):
    return from_command_line(train.Config, train.PRESETS, argv, "")


def complaint(*argv, main=train.main):
    """The sentence that a user reads in place of a run."""
    with pytest.raises((ValueError, OSError)) as caught:
        main([str(word) for word in argv])
    said = str(caught.value)
    assert said.isprintable() and 10 < len(said) < 400, said
    return said


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """refuse(*argv) -> the sentence; fails when a model was trained or anything but an empty run folder was left."""
    def no_work(*args):
        raise AssertionError("training began")
    monkeypatch.setattr(train.Run, "steps", no_work)
    monkeypatch.chdir(tmp_path)             # --out is left empty by some

    def call(*argv, out="run"):
        said = complaint(*argv, *([f"--out={out}"] if out else []))
        assert not [path for path in (tmp_path / (out or "out")).rglob("*") if path.is_file()]
        return said
    return call


def files(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in Path(folder).rglob("*") if path.is_file()}


def tensors(value, name=""):
    """All tensors of a checkpoint, under their dotted names."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else []
    return {key: found for part, inner in items for key, found in tensors(inner, f"{name}.{part}").items()}


def same_tensors(a, b):
    a, b = tensors(a), tensors(b)
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the stages clip, align and cot, one step each. Read only."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main([*SMALL, "--stage=clip,align,cot", f"--out={out}"])
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


# ---------------------------------------------------------------- names and values

@pytest.mark.parametrize("flags, said", [
    ("--grop=8", r"unknown option --grop; did you mean --group\?"),
    ("--rl_stepz=8", r"unknown option --rl-stepz; did you mean --rl-steps\?"),
    ("--qqqqq", r"unknown option --qqqqq; --help lists all options"),
    ("8", r"'8' is not an option; options look like --name=value"),
    ("-g=8", r"'-g=8' is not an option"),
    ("--out", r"--out: expected one argument"),
    ("--group=x", r"--group=x must be a whole number"),
    ("--group=8.0", r"--group=8.0 must be a whole number"),
    ("--group=", r"--group= must be a whole number"),
    ("--resume=maybe", r"--resume=maybe must be True or False"),
    ("--rl-lr=nan", r"--rl-lr=nan must be a number"),
    ("--rl-lr=inf", r"--rl-lr=inf must lie in \(0, 10000\]"),
    ("--rl-lr=fast", r"--rl-lr=fast must be a number"),
    ("--heads=3", r"width 128 must be an even multiple of heads 3"),
    ("--kv-heads=3", r"heads 4 must be a multiple of kv_heads 3"),
    ("--clip-heads=3", r"clip width 128 must be a multiple of its heads 3"),
    ("--patch=7", r"image_size 48 must be a multiple of patch 7"),
    ("--image-size=60", r"--image-size=60 must be 48 for drawn scenes"),
    ("--group=1", r"--group=1 must be at least 2: a group of one has no baseline"),
    ("--mini-batches=5", r"--rl-batch=32 must be a multiple of --mini-batches=5"),
    ("--min-new=50", r"--min-new=50 must not exceed --max-new=32"),
    ("--feature-layer=-9", r"--feature-layer=-9 must lie in \[-2, -1\]"),
    ("--layers=0", r"--layers=0 must lie in \[1, 1024\]"),
    ("--rl-steps=-1", r"--rl-steps=-1 must lie in \[0, 1000000000\]"),
    ("--seed=-1", r"--seed=-1 must lie in \[0, 2147483647\]"),
    ("--val-percent=100", r"--val-percent=100 must lie in \[1, 99\]"),
    ("--slip=1.5", r"--slip=1.5 must lie in \[0, 1\]"),
    ("--beta2=1", r"--beta2=1.0 must lie in \[0, 1\)"),
    ("--theta=0", r"--theta=0.0 must lie in \[1, 1e12\]"),
    ("--vocab=300", r"--vocab=300 is too small: .* need at least 3\d\d"),
    ("--stage=fly", r"--stage=fly: 'fly' must be one of clip, align, sft, cot, rl"),
    ("--seeds=2 --bench=step", "--seeds=2 must be left out beside --explain and --bench"),
    ("--stage=cot,grpo --group=1", "--group=1 must be at least 2: a group of one has no baseline but itself"),
    ("--teacher=mine.py:teach --data=llava:x.json", "--teacher=mine.py:teach must be left out with --data=llava:FILE"),
    ("--stage=", r"--stage=: '' must be one of clip"),
    ("--compare=some", r"--compare=some must be one of basic, none, all"),
    ("--loss=ppp", r"--loss=ppp must be one of .*cispo"),
    ("--algorithm=gpro", "must be one of grpo_token, grpo, dr_grpo"),
    ("--bound=1.1", "--bound=1.1 must be 0 or at least 1 [+] --clip-high=0.2"),
    ("--baseline=critic", "--baseline=critic must come with --std=batch or --std=none"),
    ("--value-lr=inf", r"--value-lr=inf must lie in \(0, 10000\]"),
    ("--refill=1 --flat=count", "--flat=count must be drop"),
    ("--stage=ppo --algorithm=dapo", "--algorithm=dapo must be grpo_token where stages are named after"),
    ("--rewards=iou:1", "iou needs samples with boxes, and --data=scenes has none"),
    ("--stage=ppo --std=group", "--baseline=critic must come with"),
    ("--combine=each --baseline=batch --std=none", "must be mean with --combine=each"), ("--top-entropy=0", r"\(0, 1"),
    ("--refill=1 --baseline=critic --std=none", "--refill=1 must be 0 where"), ("--kl-coef=-1", r"must lie in \[0, "),
    ("--projector=x", r"--projector=x must be one of linear, mlp2x_gelu"),
    ("--clip-stem=x", r"--clip-stem=x must be one of mlp, conv"),
    ("--template=x", r"--template=x must be one of brief, auto, vicuna_v1, llama_2, chatml"),
    ("--template=chatml", r"--template=chatml must be a template whose tokens the tokenizer has, as brief is: the "
     r"tokenizer has no token '<\|im_start\|>'"),
    ("--preset=huge", r"--preset=huge must be one of embedded, evidence, routes, generalisation, "),
    ("--dtype=int8", r"--dtype=int8 must be one of float32, mixed, bfloat16, float64"),
    ("--device=tpu", r"--device=tpu is not available here"),
    ("--rewards=", r"--rewards=: '' must be one of correctness, format"),
    ("--rewards=joy:1", r"--rewards=joy:1: 'joy' must be one of correctness, format"),
    ("--rewards=format:x", r"--rewards=format:x: the weight 'x' of format must be a number"),
    ("--rewards=format:inf", r"--rewards=format:inf: the weight of format must lie in"),
    ("--data=photos", r"--data=photos must be scenes, monitors, images:DIR, torchvision:NAME@DIR, jsonl:FILE, "
     "records:FILE or llava:FILE"),
    ("--data=images", r"--data=images must be scenes, monitors, images:DIR, torchvision:NAME@DIR, jsonl:FILE, "
     "records:FILE or llava:FILE"),
    ("--data=images:", r"--data=images: must be scenes, monitors, images:DIR, torchvision:NAME@DIR, jsonl:FILE, "
     "records:FILE or llava:FILE"),
    ("--data=scenes:x", r"--data=scenes:x must be scenes, monitors, images:DIR, torchvision:NAME@DIR, jsonl:FILE, "
     "records:FILE or llava:FILE"),
    ("--align-epochs=inf", r"--align-epochs=inf must lie in \[0, 100000\]"),
    ("--max-new=1000000000", r"--max-new=1000000000 must lie in \[1, 131072\]"),
    ("--seed=2147483647 --seeds=2", "--seed=2147483647 must leave room for --seeds=2"),
    ("--rewards=correctness:1e39", r"the weight of correctness must lie in \[-1000000, 1000000\]"),
    ("--rewards=format:nan", r"the weight of format must lie in \[-1000000, 1000000\]"),
    ("--vocab=2", r"--vocab=2: sentencepiece cannot train a tokenizer of that size on this data"),
    ("--threads=100000", r"--threads=100000 must lie in \[0, 1024\]"),
    ("--data=images:/no/such", r"folder '/no/such' does not exist; expected DIR/<class>"),
    ("--data=jsonl:/no/such", r"jsonl file '/no/such' does not exist; expected"),
])
def test_a_wrong_flag_is_one_sentence_before_any_work(refuse, flags, said):
    assert re.search(said, refuse(*flags.split()))


# ---------------------------------------------------------------- ranges of numbers

NUMBERS = [(config, name, field) for config in (train.Config, evaluation.Config)
           for name, (_, field) in options(config).items() if field.type in (int, float)]


def bounds(interval):
    least, most = (float(bound) for bound in interval[1:-1].split(","))
    return least, most


def test_every_number_has_a_range_and_its_default_lies_inside():
    for _, name, field in NUMBERS:
        assert inside(field.default, field.metadata["interval"]), name
    assert all("interval" not in field.metadata for config in (train.Config, evaluation.Config)
               for _, field in options(config).values() if field.type in (bool, str))


def numbers(kind, least, most):
    """Any number of `kind` from `least` to `most`, the bounds and the extremes more often than chance."""
    if kind is int:
        return st.integers(math.ceil(least), math.floor(most))
    return st.floats(least, most, allow_nan=False)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data(), number=st.sampled_from(NUMBERS))
def test_a_number_outside_its_range_is_one_sentence_that_names_it(data, number):
    config, name, field = number
    kind, interval = field.type, field.metadata["interval"]
    least, most = bounds(interval)
    far = 10 ** 400 if kind is int else math.inf
    outside = st.one_of(numbers(kind, -1e30, least), numbers(kind, most, 1e30), st.sampled_from([far, -far]))
    value = data.draw(outside.filter(lambda drawn: not inside(drawn, interval)))
    with pytest.raises(ValueError) as caught:
        change(config(), **{name: value})
    assert str(caught.value) == f"{flag(name)}={value} must lie in {interval}"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_numbers_inside_their_ranges_never_end_in_anything_but_a_sentence(data):
    values = {}
    for config, name, field in NUMBERS:
        interval = field.metadata["interval"]
        if config is train.Config and data.draw(st.integers(0, 9)) == 0:
            values[name] = data.draw(numbers(field.type, *bounds(interval)).filter(lambda x: inside(x, interval)))
    try:
        change(train.Config(), **values).check()
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 400


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_on_a_machine_without_it_is_one_sentence(refuse):
    assert refuse("--device=cuda").startswith("--device=cuda is not available here: ")


@pytest.mark.parametrize("name", ("auto", "cpu"))
def test_whoever_picks_a_device_computes_without_cudnns_attention(name):
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device(name)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_program_says_the_sentence_and_nothing_else_and_exits_with_1(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--group=1"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "train.py: --group=1 must be at least 2: a group of one has no baseline but itself (--baseline=batch and "
        "critic need none)\n")
    assert not list(tmp_path.iterdir())


def test_help_lists_every_field_with_its_comment_and_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    said, comment = " ".join(capsys.readouterr().out.split()), comments(train.Config)
    for name, (_, field) in options(train.Config).items():
        assert f"{flag(name)} " in said, name
        assert f"{' '.join(comment[name].split())} [{field.default}]" in said, name


@pytest.mark.parametrize("cls", [train.Config, evaluation.Config])
def test_every_field_has_a_comment(cls):
    found = comments(cls)
    assert [name for name in options(cls) if not found.get(name)] == []


@pytest.mark.parametrize("text, value", [("True", True), ("False", False), ("true", True), ("false", False),
                                         ("1", True), ("0", False), ("yes", True), ("no", False)])
def test_true_and_false_parse_as_such(text, value):
    assert parse(f"--tied={text}").llm.tied is value and parse("--gated", text).reward.gated is value


def test_a_flag_of_yes_or_no_alone_means_yes():
    assert parse("--resume").run.resume is True and parse("--resume", "--seed=3").run.seed == 3


def test_numbers_parse_with_dashes_underscores_equals_signs_and_spaces():
    config = parse("--rl-lr=1e-3", "--rl_steps", "7", "--feature-layer", "-1")
    assert (config.rl.rl_lr, config.rl.rl_steps, config.vlm.feature_layer) == (1e-3, 7, -1)


def test_a_flag_overrides_the_preset_and_the_preset_the_default():
    config = parse("--preset=tiny", "--width=64")
    assert (config.run.preset, config.llm.width, config.llm.layers) == ("tiny", 64, train.PRESETS["tiny"]["layers"])
    assert parse("--data=images:x").run.preset == "images" and parse().run.preset == "embedded"


def test_a_config_written_as_flags_reads_back_the_same():
    config = parse("--preset=tiny", "--tied=False", "--rl-lr=3e-4", "--data=jsonl:a b=c.jsonl", "--feature-layer=-1")
    assert parse(*to_command_line(config)) == config


# ---------------------------------------------------------------- run folders

def test_a_folder_that_holds_a_run_is_not_touched_without_resume(run):
    before = files(run)
    assert complaint(*SMALL, "--stage=clip", f"--out={run}") == (
        f"--out={run} already holds a run; add --resume to go on with it or choose another folder")
    assert files(run) == before


def test_a_folder_with_a_stray_checkpoint_is_not_taken_for_a_new_run(run):
    (run / "config.json").unlink()
    before = files(run)
    assert "already holds a run" in complaint(*SMALL, "--stage=clip", f"--out={run}")
    assert files(run) == before


def test_resume_without_a_run_is_one_sentence(refuse):
    assert refuse("--resume") == "--out=run holds no run to --resume"
    assert refuse("--resume", out="") == "--resume found no unfinished run under out/; name its folder with --out=DIR"


def test_resume_with_another_config_names_the_field_and_both_values(run):
    before = files(run)
    said = complaint(*SMALL, "--stage=clip,align,cot", f"--out={run}", "--resume", "--cot-lr=0.5")
    assert said == (f"--cot-lr=0.5 must be {train.Config().supervised.cot_lr}, as in the run in {run} that --resume "
                    "goes on with")
    assert files(run) == before


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_resume_with_a_damaged_config_is_one_sentence(run, text):
    (run / "config.json").write_text(text)
    said = complaint(*SMALL, "--stage=clip,align,cot", f"--out={run}", "--resume")
    assert said.endswith("config.json is damaged; the run cannot be resumed")


@pytest.mark.parametrize("field, value, expected", [
    ("rl_lr", "fast", "a number"), ("layers", 2.5, "a whole number"), ("layers", True, "a whole number"),
    ("tied", "yes", "true or false"), ("data", None, "text"), ("batch", [3], "a whole number")])
def test_a_field_of_the_wrong_type_in_a_saved_config_is_named(run, field, value, expected):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {field: value}))
    said = complaint("--resume", f"--out={run}")
    assert said == f"the config.json of the run that --resume goes on with has {field}={value!r}; expected {expected}"


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("")], ids=["deleted", "emptied"])
def test_a_log_that_lost_its_lines_is_not_resumed_in_silence(run, spoil):
    spoil(run / "log.jsonl")
    (run / "results.json").unlink()
    said = complaint("--resume", f"--out={run}")
    assert re.search(r"log.jsonl' has 0 bytes and must have at least \d+, .*; put it back, or start a new run", said)


def test_a_folder_that_another_run_holds_is_refused_and_left_alone(run):
    with RunFolder(run) as holder:
        holder.hold()
        before = files(run)
        for argv in (["--resume"], [*SMALL, "--stage=clip,align,cot", "--resume"]):
            said = complaint(*argv, f"--out={run}")
            assert re.match(rf"--out=\S+ is in use by process {os.getpid()} on \S+ since \d", said)
        assert files(run) == before
    train.main(["--resume", f"--out={run}"])


def test_two_new_runs_of_one_name_never_share_a_folder(tmp_path):
    slow, fast = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with fast:
        fast.create({"data": "scenes"})
    with pytest.raises(ValueError, match="already holds a run"):        # though both were told that the folder is free
        slow.create({"data": "scenes"})
    slow.release()


@pytest.mark.slow
def test_of_ten_processes_in_one_run_folder_one_works_and_nine_are_refused(tmp_path):
    whole, shared = tmp_path / "whole/run", tmp_path / "shared/run"
    flags = [*SMALL, "--threads=1", "--clip-steps=300", "--stage=clip,align,cot"]
    for out, argv in ((whole, [*flags, f"--out={whole}"]), (shared, [*flags, f"--out={shared}"])):
        with pytest.MonkeyPatch.context() as patch:
            # Neither gets further than its first stage.
            patch.setitem(train.STAGES, "align", dataclasses.replace(train.STAGES["align"], train=None))
            with pytest.raises(TypeError):
                train.main(argv)
    (shared / "clip.pt").unlink()
    train.main(["--resume", f"--out={whole}"])
    # The one that has the folder trains only when the other nine have ended: however slow they start, none of them
    # comes to a folder that is free again.
    go_on = tmp_path / "go_on"
    patient = (f"import dataclasses, pathlib, sys, time; sys.path.insert(0, {str(ROOT)!r}); import train\n"
               "def clip(*given):\n"
               f"    while not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.05)\n"
               "    return stage.train(*given)\n"
               "stage = train.STAGES['clip']\n"
               "train.STAGES['clip'] = dataclasses.replace(stage, train=clip)\n"
               f"train.main(['--resume', {f'--out={shared}'!r}])")
    program = [sys.executable, "-c", patient]
    started = [subprocess.Popen(program, stderr=(tmp_path / f"said{n}").open("w")) for n in range(10)]
    while [process.poll() for process in started].count(None) > 1:
        time.sleep(0.05)
    go_on.touch()
    codes = [process.wait() for process in started]
    said = [(tmp_path / f"said{n}").read_text() for n in range(10)]
    assert codes.count(0) == 1 and sum("is in use by process" in text for text in said) == 9
    steps = [[(line["stage"], line["step"]) for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())]
             for out in (whole, shared)]
    assert steps[0] == steps[1] and len(steps[0]) == len({*steps[0]})


def test_resume_of_a_finished_run_changes_no_checkpoint(run, capsys):
    before = files(run)
    train.main([*SMALL, "--stage=clip,align,cot", f"--out={run}", "--resume"])
    assert "clip: done before" in capsys.readouterr().out
    after = files(run)
    assert all(after[name] == before[name] for name in before if name.suffix in (".pt", ".jsonl", ".model"))


def test_out_that_is_a_file_or_lies_under_one_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert complaint(*SMALL, f"--out={tmp_path / 'file'}").endswith("must be a folder, it is a file")
    assert "cannot be made" in complaint(*SMALL, f"--out={tmp_path / 'file/run'}")
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- checkpoints to start from

def spoil(kind, whole, path):
    """Writes a file that is no checkpoint of ours to `path`."""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind in ("half", "one byte short"):
        data = whole.read_bytes()
        path.write_bytes(data[:len(data) // 2 if kind == "half" else -1])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("folder/data.pkl", "hello")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"stage": "cot"}))
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "other project's":
        torch.save({"model": {"weight": torch.zeros(3)}}, path)
    elif kind == "code":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize("kind, said", [
    ("missing", "does not exist"), ("folder", "does not exist"), ("empty", "truncated or not a checkpoint"),
    ("text", "truncated or not a checkpoint"), ("half", "truncated or not a checkpoint"),
    ("one byte short", "truncated or not a checkpoint"), ("pickle", "truncated or not a checkpoint"),
    ("zip", "cannot be read"), ("tensor", "not a checkpoint of this project"),
    ("other project's", "not a checkpoint of this project"), ("code", "more than tensors, numbers and text")])
def test_what_is_no_checkpoint_is_one_sentence_that_names_the_file(refuse, finished, tmp_path, kind, said):
    path = tmp_path / "init.pt"
    spoil(kind, finished / "cot.pt", path)
    message = refuse("--stage=rl", f"--init={path}")
    assert message.startswith(f"checkpoint '{path}' ") and said in message
    assert said in complaint(f"--checkpoint={path}", main=evaluation.main)


def test_a_stage_without_what_it_starts_from_says_what_it_needs(refuse):
    rest = "put that before it, or name its checkpoint with --init="
    assert refuse("--stage=rl") == f"--stage=rl: rl starts from cot or sft or align; {rest}"
    assert refuse("--stage=cot,rl") == f"--stage=cot,rl: cot starts from sft or align; {rest}"
    assert refuse("--stage=clip,rl") == f"--stage=clip,rl: rl starts from cot or sft or align; {rest}"


def test_a_method_that_spends_what_rl_cost_says_that_rl_is_missing(refuse, finished):
    said = refuse("--stage=cot_continued", f"--init={finished / 'cot.pt'}")
    assert said == "--stage=cot_continued: cot_continued is given the FLOPs that rl took; put rl before it"


def test_the_checkpoint_of_a_wrong_stage_says_what_it_is(refuse, finished, run):
    clip = finished / "clip.pt"
    assert refuse("--stage=rl", f"--init={clip}", out="new") == (
        f"--init={clip} cannot start --stage=rl: it is the checkpoint of stage 'clip' and holds no vision-language "
        "model")
    assert refuse("--stage=clip", f"--init={clip}", out="new") == (
        f"--init={clip} has no effect on --stage=clip, which starts from nothing")
    state = checkpoint.load(finished / "cot.pt")
    checkpoint.save(run / "progress.pt", {name: state[name] for name in ("stage", "log_bytes")})
    assert "holds no tokenizer or vision-language model" in refuse("--stage=rl", f"--init={run / 'progress.pt'}",
                                                                   out="new")
    assert "holds no vision-language model" in complaint(f"--checkpoint={clip}", main=evaluation.main)


def test_stages_start_from_the_init_of_another_run_and_take_its_shape(finished, tmp_path, capsys):
    train.main([*SMALL, "--stage=rl,cot_continued", f"--init={finished / 'cot.pt'}", f"--out={tmp_path / 'new'}",
                "--ff=128"])
    rows = json.loads((tmp_path / "new/results.json").read_text())
    assert {row["method"] for row in rows} == {"teacher", "before", "grpo_token", "cot_continued"}
    assert "note: --init decides the model's shape: ff=64, not 128\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "new/config.json").read_text())["ff"] == 64


def test_verdicts_on_demand_are_those_of_the_run(finished, capsys):
    found = json.loads((finished / "verdicts.json").read_text())
    assert {row["question"] for row in found if row["split"] == "id"} == {"looking", "thinking", "reflection"}
    assert {*json.loads((finished / "interventions.json").read_text())} == {"cot"}
    evaluation.main([f"--checkpoint={finished / 'cot.pt'}", "--verdicts", "--splits=id", *(
        flag for flag in SMALL if flag.startswith("--eval-"))])
    said = capsys.readouterr().out
    for row in found:
        if row["split"] == "id":
            assert f"  {row['question']}: {row['finding']}. {row['sentence']}\n" in said
    said = complaint(f"--checkpoint={finished / 'cot.pt'}", "--verdicts", "--prompting=ccot", main=evaluation.main)
    assert said == "--verdicts goes with plain completions: expected it without --prompting and --search"


def labels_on_disk(out):
    """What each file of a finished run calls what its RL stages made."""
    others = {"teacher", "before"}

    def rows(name):
        return json.loads((out / f"{name}.json").read_text())

    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "results": {row["method"] for row in rows("results")} - others, "kinds": {
            row["method"] for row in rows("kinds")} - others,
        "scores": {*rows("scores")} - others, "training": {row["method"] for row in rows("training")},
        "log": {line["method"] for line in log if "reward" in line},
        "checkpoints": {checkpoint.load(path)["label"] for path in out.glob("*.pt")},
        "page": {*re.findall(r"<tr><th>(\S+)</th><td>\d+ of \d+ right", (out / "report.html").read_text())} - others}


@pytest.mark.parametrize("flags, labels", [
    (["--stage=rl,grpo"], ["grpo_token", "grpo"]), (["--stage=rl", "--algorithm=ppo"], ["ppo"]),
    (["--stage=rl,right", "--kl-coef=0.5"], ["grpo_token[kl_coef=0.5]", "right[kl_coef=0.5]"])])
def test_every_file_of_a_run_calls_a_setting_by_its_one_label(finished, tmp_path, capsys, flags, labels):
    out, wanted, first = tmp_path / "run", {*labels}, labels[0]
    train.main([*SMALL, *flags, f"--init={finished / 'cot.pt'}", f"--out={out}"])
    for file, found in labels_on_disk(out).items():
        assert found == wanted, file
    said = capsys.readouterr().out
    assert f"Paired difference to {first} in points, T = 1" in said
    differences = json.loads((out / "differences.json").read_text())
    assert {row["metric"] for row in differences} == {f"accuracy - {first}"}
    assert {row["method"] for row in differences} == {"teacher", "before", *wanted} - {first}
    evaluation.main([f"--checkpoint={out / 'rl.pt'}", "--eval-greedy=1", "--eval-sampled=1", "--eval-samples=1",
                     "--splits=id"])
    assert f"\n{first} " in capsys.readouterr().out


def test_resume_takes_the_config_of_the_run_and_the_newest_without_results(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out/late-1")
    (tmp_path / "out/late-1/results.json").unlink()
    shutil.copytree(finished, "out/later-1")            # finished, so there is nothing to go on with
    train.main(["--resume"])
    assert (tmp_path / "out/late-1/results.json").exists()
    said = complaint("--resume", "--out=out/later-1", "--cot-lr=0.5")
    assert said.startswith("--cot-lr=0.5 must be 0.002, as in the run in out/later-1")


def test_resume_on_other_data_is_one_sentence(tmp_path):
    _, path = write_jsonl(tmp_path)
    train.main([*SMALL, "--vocab=400", "--image-size=24", f"--data=jsonl:{path}", "--stage=clip",
                f"--out={tmp_path / 'run'}"])
    path.write_text(path.read_text().replace('"What?"', '"Which?"') + path.read_text().splitlines()[0])
    said = complaint("--resume", f"--out={tmp_path / 'run'}")
    assert said == (f"--data=jsonl:{path} must hold what it held when the run in {tmp_path / 'run'} began: put it "
                    "back as it was, or, if nothing in it has changed, start a new run, since an older version of this "
                    "code that read its splits otherwise began that one")


def test_training_that_diverges_stops_before_anything_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda *_: 1e30)
    said = complaint(*SMALL, "--stage=clip", "--clip-steps=9", f"--out={tmp_path / 'run'}")
    assert "training diverged" in said and not (tmp_path / "run/clip.pt").exists()
    page = (tmp_path / "run/report.html").read_text()       # which one looks at to see why
    assert "<li>The run stopped: " in page and "training diverged" in page and "<b>clip: grad_norm</b>" in page


def test_a_teacher_without_a_right_chain_leaves_filtered_as_it_was(finished, tmp_path):
    train.main([*SMALL, "--stage=rl,filtered", f"--init={finished / 'cot.pt'}", f"--out={tmp_path / 'new'}",
                "--forget-close=1"])
    before, after = (checkpoint.load(path)["vlm"] for path in (finished / "cot.pt", tmp_path / "new/filtered.pt"))
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------- data of one's own

def write_jsonl(folder, count=24, **more):
    """`count` small pictures, red or blue, half of them with a reasoning; every fourth is for validation."""
    rng, lines = np.random.default_rng(0), []
    for n in range(count):
        colour = ("red", "blue")[n % 2]
        pixels = rng.integers(0, 90, (20, 24, 3), dtype=np.uint8)
        pixels[..., (0, 2)[n % 2]] += 160
        Image.fromarray(pixels).save(folder / f"{n}.png")
        reasoning = {"reasoning": f"much of it is {colour}"} if n % 4 < 2 else {}
        lines.append({"image": f"{n}.png", "question": "What colour is it?", "answer": colour,
                      "split": "val" if n % 4 == 3 else "train", **reasoning, **more})
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines, folder / "mine.jsonl"


def test_a_bad_line_of_a_jsonl_file_reaches_the_user_as_one_sentence(refuse, tmp_path):
    lines, path = write_jsonl(tmp_path)
    with open(path, "a") as file:
        file.write('{"image": "0.png", "question": "What?"}\n')
    assert refuse(f"--data=jsonl:{path}") == f"jsonl file '{path}', line 25: field 'answer' is missing"


def test_a_missing_picture_of_a_jsonl_file_reaches_the_user_as_one_sentence(refuse, tmp_path):
    _, path = write_jsonl(tmp_path)
    (tmp_path / "3.png").unlink()
    assert refuse(f"--data=jsonl:{path}") == f"jsonl file '{path}', line 4: image '{tmp_path}/3.png' does not exist"


def test_a_folder_with_an_empty_class_reaches_the_user_as_one_sentence(refuse, tmp_path):
    draw_folder(tmp_path / "pictures", per_class=4)
    (tmp_path / "pictures/owl").mkdir()
    assert "class 'owl' is left with no usable picture (empty)" in refuse(f"--data=images:{tmp_path / 'pictures'}")


def test_an_answer_or_caption_too_long_for_its_budget_is_counted_in_a_note(tmp_path, capsys):
    _, path = write_jsonl(tmp_path)
    long = "a very " * 60 + "long thing"
    with open(path, "a") as file:
        for field in ("answer", "caption", "reasoning"):
            line = {"image": "0.png", "question": "What?", "answer": "red", "split": "train", field: long}
            file.write(json.dumps(line) + "\n")
    train.main([*SMALL, "--vocab=400", "--image-size=24", f"--data=jsonl:{path}", "--stage=clip,align,cot",
                f"--out={tmp_path / 'run'}"])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3
    assert re.match(r"note: 1 of 27 answers with their tags are longer than --max-new=16 tokens", notes[0])
    assert re.match(r"note: 2 of 27 captions are longer than --text-length=40 tokens", notes[1])
    assert re.match(r"note: \d+ of 21 chains are longer than --max-new=16 tokens", notes[2])


def test_a_budget_that_no_answer_fits_is_one_sentence(refuse, tmp_path):
    _, path = write_jsonl(tmp_path)
    said = refuse("--max-new=3", "--vocab=400", f"--data=jsonl:{path}")
    assert re.fullmatch(r"--max-new=3 must be at least \d, the tokens of the shortest answer with its tags", said)


# ---------------------------------------------------------------- what would fail at the end

@pytest.mark.parametrize("flags, said", [
    ("--image-positions=False --clip-stem=conv", "must come with --image-positions=False --clip-stem=conv --clip-pool"),
    ("--stage=clip --image-positions=False --clip-stem=conv --clip-pool=class", "out where stage clip is the last")])
def test_an_export_that_can_only_fail_is_refused_at_the_start(refuse, tmp_path, flags, said):
    assert said in refuse(*flags.split(), f"--export=hf:{tmp_path / 'hf'}")


def test_an_export_under_a_file_is_refused_at_the_start(refuse, tmp_path):
    (tmp_path.parent / "file").write_text("mine")
    said = refuse("--image-positions=False", "--clip-stem=conv", "--clip-pool=class",
                  f"--export=hf:{tmp_path.parent / 'file' / 'hf'}")
    assert said.endswith(f"must lie in a folder that can be written, unlike {tmp_path.parent / 'file'}")


def test_memory_that_runs_out_is_one_sentence_and_any_other_error_stays_what_it_is():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2 ** 60, dtype=torch.float32)
    message = memory.shortage(caught.value, "ask for less")
    assert re.fullmatch(r"memory ran out for \d+ bytes more; ask for less", message)
    assert memory.shortage(MemoryError(), "ask for less") == "memory ran out; ask for less"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        memory.shortage(RuntimeError("shapes cannot be multiplied"), "")


def test_a_terminal_without_unicode_ends_no_run(finished, tmp_path):
    said = subprocess.run([sys.executable, "-W", "error", str(ROOT / "eval.py"), f"--checkpoint={finished / 'cot.pt'}",
                           "--ask=?", "--image=né.png"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert "UnicodeEncodeError" not in said.stderr and said.stderr.endswith("image 'n\\xe9.png' does not exist\n")


# ---------------------------------------------------------------- a full disk

class FullDisk:
    """open() for model.runs.checkpoint that has room for `room` bytes a file."""

    def __init__(self, room):
        self.room = room

    def __call__(self, path, mode):
        file, room = open(path, mode), self.room

        class Limited:
            def write(self, data):
                nonlocal room
                room -= len(data)
                if room < 0:
                    file.write(bytes(data)[:room])
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data)

            def __getattr__(self, name):
                return getattr(file, name)

        @contextlib.contextmanager
        def opened():
            with file:
                yield Limited()
        return opened()


@pytest.mark.parametrize("room", [0, 1000, 50_000])
def test_a_save_on_a_full_disk_is_one_sentence_and_the_earlier_file_stays(tmp_path, monkeypatch, room):
    path, state = tmp_path / "clip.pt", {"stage": "clip", "weight": torch.arange(30_000.0)}
    checkpoint.save(path, state)
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint, "open", FullDisk(room), raising=False)
    with pytest.raises(OSError) as caught:
        checkpoint.save(path, {"stage": "clip", "weight": torch.zeros(30_000)})
    assert str(caught.value) == f"cannot write '{path}': No space left on device; what was saved before is intact"
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("before")

    def refused(*_):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(checkpoint.os, "replace", refused)
    with pytest.raises(OSError, match="Input/output error; what was saved before is intact"):
        checkpoint.write_atomically(path, lambda file: file.write(b"after"))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_save_leaves_no_partial_file(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(tmp_path / "a.pt", interrupted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a file's size is set the Linux way")
def test_a_run_that_may_write_no_more_says_so_and_goes_on_once_it_may(finished, run, tmp_path):
    for name in ("cot.pt", "align.pt"):
        (run / name).unlink()
    room = (run / "clip.pt").stat().st_size + 1000          # what align.pt carries along fills that
    assert (finished / "align.pt").stat().st_size > room
    argv = [*SMALL, "--stage=clip,align,cot", f"--out={run}", "--resume"]
    program = (f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room})); "
               f"sys.argv = {['train.py', *argv]!r}; sys.path.insert(0, {str(ROOT)!r}); "
               f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.rpartition("\r")[2] == (
        f"train.py: cannot write '{run / 'align.pt'}': File too large; what was saved before is intact\n")
    assert "Traceback" not in done.stderr and not list(run.glob(".*")) and not list(run.glob("align*"))
    assert same_tensors(checkpoint.load(run / "clip.pt"), checkpoint.load(finished / "clip.pt"))
    train.main(argv)
    assert same_tensors(checkpoint.load(run / "cot.pt"), checkpoint.load(finished / "cot.pt"))


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(OSError) as caught:
        RunFolder(tmp_path).log(stage="clip", step=0)
    assert str(caught.value) == (f"cannot write '{tmp_path / 'log.jsonl'}': Is a directory; what was saved before is "
                                 "intact; --resume goes on from there")


def test_a_group_of_one_is_for_algorithms_that_compare_groups():
    for stage in ("ppo", "reinforce++"):
        parse("--stage=cot," + stage, "--group=1").check()


def test_explaining_goes_on_with_no_run():
    with pytest.raises(ValueError, match="--explain=2 must be left out beside --resume"):
        change(train.Config(), resume=True, explain=2)


def test_a_clip_alone_takes_any_projector_and_decoder(finished, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--preset=tiny", "--stage=align", f"--init={finished / 'clip.pt'}", "--patch=24", "--align-steps=1",
                "--projector=mlp2x_gelu", "--width=64", f"--out={out}"])
    assert checkpoint.load(out / "align.pt")["vlm_config"]["projector"] == "mlp2x_gelu"
    assert "decides the model's shape: projector" not in capsys.readouterr().out


def test_a_teacher_that_fails_on_a_test_prompt_is_found_before_training(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def teach(sample, rng):\n    assert 'walk' not in sample.id\n"
                                      "    return 'a', 'b'\n")
    monkeypatch.setattr(train.Run, "steps", lambda *_: pytest.fail("training began"))
    said = complaint("--preset=tiny", f"--teacher={tmp_path / 'mine.py'}:teach", f"--out={tmp_path / 'run'}")
    assert "teacher, sample 'walk" in said and not (tmp_path / "run").exists()
