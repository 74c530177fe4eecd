"""The time that a run is told before it starts: which stages, how often, and that nothing of it stays."""
import re
from types import SimpleNamespace

import pytest
import torch

import train
from data import preview
from model.runs import checkpoint
from rl import forecast
from rl.forecast import Ahead
from test_real_run import TINY, colours


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Flags of a run of a second on own pictures with reasoning, and its folder."""
    folder = tmp_path_factory.mktemp("forecast")
    flags = [*TINY, f"--data=jsonl:{colours(folder, reasoning=True)}", "--threads=1", "--stage=clip,align,sft,cot,rl",
             "--cot-steps=5", "--max-new=24", "--eval-greedy=4", "--eval-sampled=2"]
    return flags, folder


def weights(folder, stage):
    state = checkpoint.load(folder / f"{stage}.pt")
    return state.get("vlm") or state["clip"]


def test_every_stage_is_told_with_its_steps_and_nothing_of_the_estimate_stays(mine, monkeypatch, capsys):
    flags, folder = mine
    train.main([*flags, f"--out={folder / 'with'}"])
    said = capsys.readouterr().out
    assert said.index("time, by one step of each stage") < said.index("config, what differs")
    found = {name: (int(steps), float(seconds)) for name, steps, seconds in
             re.findall(r"  (\w+) +(\d+) steps +([\d.]+) s a step", said)}
    assert {name: steps for name, (steps, _) in found.items()} == dict(clip=2, align=2, sft=2, cot=5, rl=2)
    assert all(0 < seconds < 20 for _, seconds in found.values())
    total = float(re.search(r"in all +about ([\d.]+) s", said)[1])
    assert abs(total - sum(steps * seconds for steps, seconds in found.values())) < 0.06
    assert said.count("every completion at full length") == 1

    monkeypatch.setattr(forecast, "show", lambda *_: None)
    train.main([*flags, f"--out={folder / 'without'}"])
    assert "time, by one step" not in capsys.readouterr().out
    names = [{path.name for path in (folder / run).iterdir()} for run in ("with", "without")]
    assert names[0] == names[1]
    for stage in ("clip", "align", "sft", "cot", "rl"):
        one, other = (weights(folder / run, stage) for run in ("with", "without"))
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_begins_no_run_is_told_no_time(mine, capsys):
    flags, folder = mine
    train.main([*flags, f"--out={folder / 'told'}"])
    capsys.readouterr()
    train.main(["--resume", f"--out={folder / 'told'}"])
    train.main([*flags, "--explain=1", "--stage=rl", f"--init={folder / 'told' / 'cot.pt'}"])
    assert "time, by one step" not in capsys.readouterr().out


def test_stages_that_are_given_the_flops_of_others_take_as_long_and_count():
    found = [(Ahead("rl", "rl", None, 10), 2.0), (Ahead("cot", "supervised", None, 5), 1.0),
             (Ahead("perfect", "", None, like=("cot", "rl")), ""),
             (Ahead("sft", "supervised", None, 5), "not measured: x")]
    lines = forecast.table(found).splitlines()
    assert "as many FLOPs as cot and rl, so about as long" in lines[3] and "not measured: x" in lines[4]
    assert lines[-1].split() == ["in", "all", "about", "50.0", "s,", "without", "sft"]      # 20, 5, and 25 again


def test_a_micro_batch_stands_for_the_step(monkeypatch):
    # 12 records a step, of which 4 are measured: three times as long; then the optimizer's step, once.
    seen = []
    monkeypatch.setattr(forecast, "weighted", lambda model, device: model)
    monkeypatch.setattr(forecast.prepare, "on_meta", lambda *_: torch.nn.Linear(2, 2))
    monkeypatch.setattr(forecast, "supervised_step", lambda model, rows, tok, device: seen.append(len(rows)))
    monkeypatch.setattr(forecast, "seconds_of", lambda step, device: step() or 1.0)
    optim = SimpleNamespace(micro_batch=4, beta2=0.9, module_lr="", moments="float32", master=True)
    ahead = Ahead("sft", "supervised", SimpleNamespace(optim=optim), 5, 12, tuple(range(100)))
    assert forecast.measure(ahead, None, None, torch.device("cpu")) == 3.0 + 1.0 and seen == [4]


def test_a_stage_that_the_machine_has_no_room_for_is_not_measured(capsys):
    ahead = Ahead("sft", "supervised", None, 5, 12, (1,))
    forecast.show([ahead], None, None, torch.device("cpu"), {"sft"})
    assert "sft             not measured: its plan exceeds the machine" in capsys.readouterr().out


def test_a_step_that_fails_ends_no_run(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of everything\nsecond line")
    monkeypatch.setattr(forecast, "measure", fails)
    forecast.show([Ahead("sft", "supervised", None, 5, 12, (1,))], None, None, torch.device("cpu"))
    said = capsys.readouterr().out
    assert "not measured: out of everything" in said and "second line" not in said


def test_the_random_numbers_of_the_run_are_left_alone(monkeypatch):
    monkeypatch.setattr(forecast, "measure", lambda *_: float(torch.rand(())))
    torch.manual_seed(3)
    forecast.show([Ahead("sft", "supervised", None, 5, 12, (1,))], None, None, torch.device("cpu"))
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(()))


def test_at_most_a_thousand_records_are_encoded():
    seen = []

    def encode(number, record):
        seen.append(number)
        return [0] * (record % 7), [], ()
    rows = preview.encoded(range(5000), encode)
    assert len(rows) == len(seen) == preview.MOST and seen[0] == 0 and seen[-1] == 4999
    assert preview.longest(rows) == 6 and preview.longest([]) == 0
