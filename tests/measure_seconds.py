"""Seconds of a step as `--plan=cpuxN` models them beside those that train.py takes on this CPU, as a table.

    python tests/measure_seconds.py                 # two decoders on 1 and 2 ranks: minutes
    python tests/measure_seconds.py 1 --small       # one of them, on one rank

The median of the steps after the first is measured; the peaks are, right before. Completions are as long as they may be
and all rewards differ, as the model has it. The machine must have nothing else to do.
"""
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import measure_ranks                                # noqa: E402

# Decoders of which all trains, in fp32, and their vocabularies.
SIZES = {"small": (["--width=256", "--layers=6", "--heads=4", "--kv-heads=4", "--ff=768"], 4096),
         "large": (["--width=768", "--layers=12", "--heads=12", "--kv-heads=12", "--ff=3072"], 16384)}
LONGER = ["--sft-steps=4", "--rl-steps=3", "--inspect-every=0", "--batch=16"]


def be_a_rank(out, flags):
    """Runs one stage of train.py as one rank and keeps no checkpoint; writes what tells its step to a file."""
    import train
    from model import cards, parallel
    announce = train.Run.announce
    collate = train.collate
    told = {}
    predicted = []

    def announced(run, stage, vlm, cfg, longest, *args, **options):
        announce(run, stage, vlm, cfg, longest, *args, **options)
        image_tokens = vlm.config.image_tokens
        work = cards.work_of(cfg, stage, image_tokens, longest - image_tokens, parallel.world())
        told.update(config=vlm.config_dict(), work=asdict(work))

    def collated(rows, *args, **options):
        batch = collate(rows, *args, **options)
        predicted.append(int(batch.target[:, 1:].sum()) / len(rows))
        return batch

    def trained(run, stage, name, cfg):
        train.STAGES[stage].train(run, name, cfg, run.start(stage))
        if predicted:
            told["work"]["predicted"] = round(statistics.mean(predicted))
        if parallel.is_first():
            Path(out).write_text(json.dumps(told))

    train.Run.announce = announced
    train.Run.finish_stage = lambda *args: None
    train.preflight = lambda *args: None
    train.collate = collated
    train.train_stage = trained
    train.compare_methods = lambda run: None
    train.main(flags)


def seconds_of_log(path):
    """log.jsonl of a stage -> {part: [seconds of each step but the first]}."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if "step" in line]
    if "seconds_update" not in lines[0]:
        return {"step": [after["seconds"] - before["seconds"] for before, after in zip(lines, lines[1:])]}
    rollout = [sum(line[f"seconds_{lap}"] for lap in ("encode", "prefill", "decode")) for line in lines[1:]]
    return {"rollout": rollout, "update": [line["seconds_update"] for line in lines[1:]]}


def modelled(told, shard, ranks, card):
    """{part: seconds} by what a rank has told of its step."""
    import torch

    from model.cards import Work, seconds_of
    from model.vlm import VLM
    with torch.device("meta"):
        vlm = VLM.from_config(told["config"])
    found = seconds_of(vlm, Work(**told["work"]), shard, ranks, card)
    if "rollout" not in found:
        return {"step": sum(found.values())}
    return {"rollout": found["rollout"], "update": sum(found.values()) - found["rollout"]}


def measure(folder, size, counts):
    """[(size, ranks, shard, part of a stage, seconds modelled, seconds measured)]."""
    from model import peaks
    shape, vocab = SIZES[size]
    flags = [*measure_ranks.common_flags(folder, shape), *LONGER]
    words = ["--begin", str(vocab), *flags, "--stage=clip,align", f"--out={folder / 'start'}"]
    measure_ranks.run([measure_ranks.__file__, *words])
    found = []
    for ranks in counts:
        card = peaks.cpu(ranks)
        threads = peaks.threads_of(ranks)
        for shard in ("none", "full")[:ranks]:
            for stage in ("sft", "rl"):
                out = folder / f"{stage}-{ranks}-{shard}"
                told = folder / f"{stage}-{ranks}-{shard}.json"
                measure_ranks.run(
                    [__file__, "--rank", str(told), *flags, f"--threads={threads}", f"--shard={shard}",
                     f"--stage={stage}", f"--init={folder / 'start' / 'align.pt'}", f"--out={out}"], ranks, threads)
                planned = modelled(json.loads(told.read_text()), shard, ranks, card)
                for part, seconds in seconds_of_log(out / "log.jsonl").items():
                    found.append((size, ranks, shard, f"{stage}, {part}", planned[part], statistics.median(seconds)))
                    print(text(found[-1:]).splitlines()[-1], flush=True)
    return found


def text(found):
    """The rows as a table."""
    lines = [f"{'size':<7}{'ranks':<6}{'--shard':<8}{'what':<13}{'modelled, s':>12}{'measured, s':>13}"
             f"{'modelled / measured':>21}"]
    for size, ranks, shard, what, planned, seconds in found:
        lines.append(f"{size:<7}{ranks:<6}{shard:<8}{what:<13}{planned:12.3f}{seconds:13.3f}{planned / seconds:21.2f}")
    return "\n".join(lines)


def main(argv):
    if argv[:1] == ["--rank"]:
        return be_a_rank(argv[1], argv[2:])
    counts = [int(word) for word in argv if word.isdecimal()] or [1, 2]
    sizes = ["small"] if "--small" in argv else [*SIZES]
    print(text([]))
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), size, counts)


if __name__ == "__main__":
    main(sys.argv[1:])
