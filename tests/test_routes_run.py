"""The three routes to reasoning from the command line: the comparison, the ladder of rates, prompting and search on a
LLaVA folder, teachers of every kind and what is learned from their records."""
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from data.prompting import METHODS
from data.records import HELD_OUT, REASONS
from llava_folder import COLOURS, train_tokenizer
from model.hub.export import export_hf
from model.runs import checkpoint
from rl.report import ladder
from rl.search import SEARCHES
from tiny import make_vlm, samples_shown

ROOT = Path(train.__file__).parent
ROUTES = ["--preset=tiny", "--compare=routes", "--cot-format=llava_cot", "--skills=true", "--max-new=32", "--threads=1"]
# A base that is right now and then, so that rates differ in what they earn.
TUNE = [*ROUTES, "--tune=llava_o1", "--seed=100", "--eval-set=val", "--clip-steps=2", "--sft-steps=80",
        "--sft-lr=1e-2", "--rl-steps=120", "--eval-sampled=64", "--eval-samples=4"]
ARMS = ("grpo_token_from_base", "llava_o1", "llava_o1_blind", "grpo_token_from_o1")
SEARCHED = ("majority[4]", "best_of_n[4,logp]", "best_of_n[4,self]", "best_of_n[4,oracle]", "stage_beam[4,logp]",
            "stage_beam[4,self]")
STAGED = ("think", "caption_first", "stages_one_call", "stages", "ccot", "ddcot")
ROWS = ("teacher", "base", *(f"base+{name}" for name in STAGED), "base+think[64]", *ARMS,
        *(f"llava_o1+{name}" for name in SEARCHED))
SPLITS = ("id", "crowded", "pairs", "walk3", "walk4")

# train.py with a bomb: it dies of SIGKILL with half of the n-th file of a name written.
DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, ROOT)
import train
from model.runs import checkpoint

write = checkpoint.write_atomically
left = N

def my_write(path, call):
    global left

    def half(file):
        call(file)
        file.truncate(file.seek(0, 2) // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    left -= Path(path).name == NAME
    write(path, half if Path(path).name == NAME and left == 0 else call)

checkpoint.write_atomically = my_write
train.main(ARGV)
"""


def command(program, *argv):
    """The output of train.py or eval.py, run as a person runs it."""
    done = subprocess.run([sys.executable, str(ROOT / program), *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def killed(name, n, argv):
    """Runs train.py until half of the n-th file called `name` is written."""
    values = dict(ROOT=str(ROOT), NAME=name, N=n, ARGV=argv)
    head = "".join(f"{key} = {value!r}\n" for key, value in values.items())
    done = subprocess.run([sys.executable, "-c", head + DRIVER], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, f"it did not go off: {done.stderr[-2000:]}"


def read(path):
    return json.loads(path.read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- the comparison

@pytest.fixture(scope="module")
def routes(tmp_path_factory):
    """The folder of a run that was not interrupted, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, command("train.py", *ROUTES, f"--out={out}")


@pytest.mark.slow
def test_the_comparison_of_routes_holds_every_row_on_the_splits_that_it_was_asked(routes):
    out, _ = routes
    asked = {}
    for row in read(out / "results.json"):
        if row["metric"] == "accuracy":
            asked.setdefault(row["method"], set()).add(row["split"])
    few = {*SPLITS[:2]}
    wanted = {name: few if "+" in name else {*SPLITS} for name in ROWS}
    wanted["base+think[64]"] = {"id"}
    assert asked == wanted
    pass_at = {row["metric"] for row in read(out / "results.json") if row["method"] == "base+think[64]"}
    assert "pass@64" in pass_at


@pytest.mark.slow
def test_the_table_of_routes_has_costs_and_procedures_and_what_is_printed_names_every_row(routes):
    out, said = routes
    found = read(out / "routes.json")
    sampled = [row for row in found if row["decoding"] == "t1"]
    trained = {row["method"]: row["value"] for row in sampled if row["split"] == "TFLOP"}
    assert {*trained} == {row["method"] for row in sampled} - {"teacher"}
    assert {name for name, cost in trained.items() if not cost} == {name for name in trained if name.startswith("base")}
    assert trained["llava_o1+majority[4]"] == trained["llava_o1"] > 0
    spent = {row["method"]: row["value"] for row in sampled if row["split"] == "tokens"}
    assert spent.keys() == {*ROWS} - {"teacher"} and all(0 < spent[name] <= 32 for name in spent if "[4" not in name)
    # Four candidates of at least a token; a judge reads them besides.
    assert all(spent[f"llava_o1+{name}"] >= 4 for name in SEARCHED)
    assert spent["llava_o1+best_of_n[4,self]"] > spent["llava_o1+best_of_n[4,logp]"]
    shares = {}
    for row in sampled:
        if row["metric"].startswith("procedure: "):
            shares.setdefault((row["method"], row["split"]), []).append(row["value"])
    assert {method for method, _ in shares} == {*ROWS}
    assert all(sum(of_kind) == pytest.approx(1) for of_kind in shares.values())
    for title in ("Accuracy, T = 1", "Routes, T = 1", "Procedure by question kind, T = 1"):
        table = said[said.index(title):].split("\n\n")[0]
        assert {line.split("  ")[0] for line in table.splitlines()} >= {*ROWS}, title
    for name in ROWS:
        assert name == "teacher" or f"evaluated {name} " in said


@pytest.mark.slow
def test_a_comparison_killed_during_its_evaluation_and_resumed_has_the_same_results(routes, tmp_path):
    whole, _ = routes
    broken = tmp_path / "run"
    killed("scores.json", 9, [*ROUTES, f"--out={broken}"])
    assert len(read(broken / "scores.json")) == 9 and not (broken / "results.json").exists()     # 8 and the teacher
    said = command("train.py", f"--out={broken}", "--resume")
    assert "rl_from_o1: done before" in said and "evaluated base+think " not in said
    for name in ("results.json", "scores.json", "routes.json", "differences.json", "kinds.json", "verdicts.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert samples_shown(broken) == samples_shown(whole)


# ---------------------------------------------------------------- the ladder

@pytest.mark.slow
def test_a_ladder_killed_in_the_middle_and_resumed_is_the_same_and_its_best_rung_stands_for_the_arm(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said = command("train.py", *TUNE, f"--out={whole}")
    rungs = read(whole / "ladder.json")
    rates = [rung["rate"] for rung in rungs]
    assert rates == sorted(rates) and {*rates} >= {*ladder.RATES} and len(rates) <= ladder.MOST
    best = min(rungs, key=lambda rung: (-rung["value"], rung["rate"]))["rate"]
    assert re.search(rf"^  {best:<11g} .*  <- best$", said, re.MULTILINE) and said.count("<- best") == 1
    arm = (whole / "llava_o1.pt").read_bytes()
    same = [rate for rate in rates if (whole / f"llava_o1@{rate:g}.pt").read_bytes() == arm]
    assert same == [best]
    assert not (whole / "llava_o1_blind.pt").exists() and read(whole / "results.json") == []

    killed("llava_o1@0.0005.pt", 1, [*TUNE, f"--out={broken}"])
    assert (broken / "llava_o1@0.00025.pt").exists() and not (broken / "llava_o1@0.0005.pt").exists()
    said = command("train.py", f"--out={broken}", "--resume")
    assert "llava_o1@0.00025: done before" in said and "llava_o1@0.0005: done before" not in said
    assert (broken / "ladder.json").read_bytes() == (whole / "ladder.json").read_bytes()
    one, other = (checkpoint.load(folder / "llava_o1.pt")["vlm"] for folder in (whole, broken))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# ---------------------------------------------------------------- a LLaVA folder

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """hf: a LLaVA folder of random weights; mine.jsonl: eight questions with their pictures, four for validation."""
    folder = tmp_path_factory.mktemp("llava")
    tok = train.tokenizer.Tokenizer(train_tokenizer())
    torch.manual_seed(0)
    clip = dict(image_size=24, patch=8, stem="conv", pool="class")
    vlm = make_vlm(torch.float32, clip=clip, llm=dict(vocab=len(tok)), image_positions=False)
    export_hf(vlm, tok, folder / "hf")
    lines = []
    for n in range(8):
        colour = [*COLOURS][n % 4]
        Image.new("RGB", (30 + n, 24), COLOURS[colour]).save(folder / f"{n}.png")
        lines.append(dict(image=f"{n}.png", question="What colour is the square?", answer=colour, id=f"q{n}",
                          split="val" if n < 4 else "train"))
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.slow
def test_a_llava_folder_is_asked_by_every_method_and_each_stage_is_printed(folder, capsys):
    asked = [f"--llava={folder / 'hf'}", "--ask=What colour is the square?", f"--image={folder / '0.png'}",
             "--max-new=24", "--threads=1"]
    for name, stages in METHODS.items():
        evaluation.main([*asked, f"--prompting={name}"])
        said = capsys.readouterr().out
        names = "|".join(stage.name for stage in stages)
        assert re.findall(rf"^({names}): .", said, re.MULTILINE) == [stage.name for stage in stages], name
    evaluation.main([*asked, "--prompting=stages"])
    assert command("eval.py", *asked, "--prompting=stages") == capsys.readouterr().out


def on_file(folder, capsys, *flags):
    """What eval.py prints of the LLaVA folder on the validation questions of mine.jsonl."""
    evaluation.main([f"--llava={folder / 'hf'}", f"--data=jsonl:{folder / 'mine.jsonl'}", "--max-new=16", "--threads=1",
                     "--eval-samples=2", *flags])
    return capsys.readouterr().out


def cells(said, title, label):
    """The cells of a method's line in a printed table."""
    table = said[said.index(title):].split("\n\n")[0]
    [line] = [line for line in table.splitlines() if line.startswith(f"{label}  ")]
    return line[len(label):].split()


@pytest.mark.slow
def test_prompting_of_a_llava_folder_on_a_file_prints_its_tables(folder, capsys):
    for name in METHODS:
        said = on_file(folder, capsys, f"--prompting={name}")
        for title in ("Accuracy, greedy", "Accuracy, T = 1"):
            assert 0 <= float(cells(said, title, f"llava+{name}")[0]) <= 1, name
        assert "always answering 'red', the commonest answer of val, is right with 0.250" in said


@pytest.mark.slow
def test_every_search_of_a_llava_folder_on_a_file_says_what_it_cost(folder, capsys):
    spent = {}
    for name in SEARCHES:
        for scorer in ("logp", "self"):
            if name == "majority" and scorer == "self":         # it counts votes, and asks nobody
                continue
            label = name if name == "majority" else f"{name}/{scorer}"
            said = on_file(folder, capsys, f"--search={name}", "--search-n=3", f"--scorer={scorer}")
            shown = "majority[3]" if name == "majority" else f"{name}[3,{scorer}]"
            assert 0 <= float(cells(said, "Accuracy, T = 1", f"llava+{shown}")[0]) <= 1
            cost = re.search(r"^val: ([\d.]+) tokens sampled and judged for an answer of ([\d.]+)", said, re.MULTILINE)
            spent[label] = [float(number) for number in cost.groups()]
    assert all(total > answer > 0 for total, answer in spent.values())
    for name in ("best_of_n", "sentence_beam", "stage_beam"):
        assert spent[f"{name}/self"][0] > spent[f"{name}/logp"][0]          # what the judge reads is counted
    with pytest.raises(ValueError, match="--scorer=self has no effect with --search=majority"):
        on_file(folder, capsys, "--search=majority", "--scorer=self")


# ---------------------------------------------------------------- teachers

def tally_of(said, path):
    """The printed tally as {reason: replies}, "" for those kept; it must agree with the file."""
    kept, replies = re.search(r": (\d+) of (\d+) replies kept", said).groups()
    count = Counter({"": int(kept)})
    for number, reason in re.findall(rf"^ +(\d+) ({'|'.join(REASONS)}) ", said, re.MULTILINE):
        count[reason] = int(number)
    count = +count
    assert count.total() == int(replies)
    in_file = Counter(line["reason"] for line in lines_of(path))
    in_file.pop(HELD_OUT, None)
    assert count == in_file
    return count


@pytest.mark.slow
def test_a_llava_folder_and_a_checkpoint_are_teachers_whose_replies_are_kept_or_tallied(folder, routes, tmp_path,
                                                                                       capsys):
    for name, teacher in (("folder", folder / "hf"), ("checkpoint", routes[0] / "llava_o1.pt")):
        for prompting in ("stages_one_call", "stages"):
            path = tmp_path / f"{name}-{prompting}.jsonl"
            train.main(["--stage=teach", f"--teacher={teacher}", f"--data=jsonl:{folder / 'mine.jsonl'}",
                        f"--records={path}", f"--teacher-prompting={prompting}", "--teacher-max-new=24", "--threads=1"])
            count = tally_of(capsys.readouterr().out, path)
            asked = {line["id"] for line in lines_of(path) if line["reason"] != HELD_OUT}
            assert asked == {"q4", "q5", "q6", "q7"} and 4 <= count.total() <= 8      # two tries
            assert all(line["teacher"] == str(teacher) for line in lines_of(path) if line["reason"] != HELD_OUT)


@pytest.mark.slow
def test_a_model_that_cannot_teach_is_named(folder, routes, tmp_path):
    out, _ = routes
    for teacher, problem in ((out / "none.pt", "does not exist"), (out / "clip.pt", "holds no vision-language model"),
                             (tmp_path, "has no config.json")):
        with pytest.raises(ValueError, match=problem) as caught:
            train.main(["--stage=teach", f"--teacher={teacher}", f"--data=jsonl:{folder / 'mine.jsonl'}",
                        f"--records={tmp_path / 'none.jsonl'}"])
        assert str(caught.value).startswith(f"--teacher={teacher}: ")


@pytest.mark.slow
def test_the_kept_records_of_the_drawn_worlds_teacher_are_what_cot_learns(tmp_path, capsys):
    path = tmp_path / "taught.jsonl"
    train.main(["--stage=teach", "--traces=60", f"--records={path}", "--threads=1"])
    count = tally_of(capsys.readouterr().out, path)
    assert count.keys() == {"", "wrong"} and min(count.values()) >= 2 and count.total() == 60
    before = path.read_bytes()
    train.main(["--stage=teach", "--traces=60", f"--records={path}", "--threads=1"])         # asks nothing twice
    assert path.read_bytes() == before
    capsys.readouterr()

    out = tmp_path / "run"
    train.main(["--preset=tiny", f"--data=records:{path}", "--stage=clip,align,sft,cot", "--cot-format=llava_cot",
                "--cot-steps=40", "--cot-lr=1e-2", "--clip-batch=8", "--batch=8", "--vocab=400", "--max-new=64",
                "--threads=1", f"--out={out}"])
    said = capsys.readouterr().out
    assert f"teacher: {count['']} chains, 0.0 % wrong, 0 % without </REASONING>" in said
    state = checkpoint.load(out / "cot.pt")
    assert state["method"] == "llava_cot"
    losses = [line["loss"] for line in lines_of(out / "log.jsonl") if line["stage"] == "cot"]
    assert losses[-1] < losses[0] - 1
    assert {row["method"] for row in read(out / "results.json")} == {"cot"}


@contextmanager
def served(path):
    """A checkpoint behind eval.py --serve=0, in a process of its own; yields the port."""
    process = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), f"--checkpoint={path}", "--serve=0",
                                "--threads=1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        first = process.stdout.readline()
        yield int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", first)[1])
        assert process.poll() is None
    finally:
        process.terminate()
        _, complaints = process.communicate(timeout=60)
    assert "Traceback" not in complaints


@pytest.mark.slow
def test_a_served_checkpoint_as_the_teachers_endpoint_answers_every_question(folder, routes, tmp_path, capsys):
    with served(routes[0] / "llava_o1.pt") as port:
        asked = ["--stage=teach", f"--teacher=http://127.0.0.1:{port}/v1", f"--data=jsonl:{folder / 'mine.jsonl'}",
                 "--teacher-max-new=16", "--teacher-jobs=2", "--teacher-tries=1"]
        with pytest.raises(ValueError, match="HTTP 404 model must be 'run/llava_o1', the only one here, not 'x'"):
            train.main([*asked, f"--records={tmp_path / 'none.jsonl'}", "--teacher-model=x"])
        for prompting in ("stages_one_call", "stages"):
            path = tmp_path / f"{prompting}.jsonl"
            train.main([*asked, f"--records={path}", f"--teacher-prompting={prompting}",
                        "--teacher-model=run/llava_o1"])
            count = tally_of(capsys.readouterr().out, path)
            replies = [line for line in lines_of(path) if line["reason"] != HELD_OUT]
            assert sorted(line["id"] for line in replies) == ["q4", "q5", "q6", "q7"] and count["failed"] == 0
            assert all(line["served"] and line["usage"]["completion_tokens"] > 0 for line in replies)
