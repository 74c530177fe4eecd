"""The plan of a rank's memory (memory_of in model/cards.py) beside the most that ranks on this CPU hold, as a table.

    python tests/measure_ranks.py                   # 200 M parameters on 1, 2 and 4 ranks: 8 GB, minutes
    python tests/measure_ranks.py 2                 # on 2
    python tests/measure_ranks.py 2 --small         # 21 M

Each rank tells the most that it held at any time of a stage, loading and saving included, above what it held before its
model was loaded: libraries, torch.distributed, tokenizer, drawn pictures. Completions are as long as they may be and
all rewards differ, as the plan has it. Linux only.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from measure_memory import REWARD                   # noqa: E402

# Decoders of which all trains, in fp32, and their vocabularies: the words of drawn scenes are few.
SIZES = {"small": (["--width=384", "--layers=8", "--heads=6", "--kv-heads=6", "--ff=1536", "--save-every=1"], 4096),
         "large": (["--width=1024", "--layers=13", "--heads=16", "--kv-heads=16", "--ff=2816"], 16384)}
# An untrained decoder whose head is its embedding would only repeat itself, and all rewards would be equal.
STEPS = ["--preset=tiny", "--device=cpu", "--compare=none", "--clip-steps=1", "--align-steps=0", "--sft-steps=2",
         "--rl-steps=2", "--save-every=100", "--batch=8", "--rl-batch=4", "--group=4", "--max-new=16", "--min-new=16",
         "--gated=False", "--tied=False"]


# ---------------------------------------------------------------- in a process of its own

def begin(words, flags):
    """Runs train.py with these flags, its decoder with so many words."""
    import train
    from model.llama import LlmOptions
    of_tokenizer = LlmOptions.config
    LlmOptions.config = lambda options, vocab: of_tokenizer(options, words)
    train.compare_methods = lambda run: None
    train.main(flags)


def be_a_rank(out, flags):
    """Runs one stage of train.py as one rank, and writes [bytes planned by part, bytes measured] to a file."""
    import torch

    import train
    from model import cards, machine, memory, parallel, prepare
    train_stage = train.train_stage
    announce = train.Run.announce
    planned = {}

    def measured(run, stage, name, cfg):
        machine.warm_up()
        machine.give_holes_back()
        before = machine.resident()
        Path("/proc/self/clear_refs").write_text("5")       # the peak starts anew
        train_stage(run, stage, name, cfg)
        peak = machine.number_after("VmHWM", "/proc/self/status") - before
        Path(f"{out}-{parallel.rank()}").write_text(json.dumps([planned, peak]))

    def announced(run, stage, vlm, cfg, longest, *args, **options):
        announce(run, stage, vlm, cfg, longest, *args, **options)
        shape = prepare.on_meta(vlm.config, cfg, stage)
        image_tokens = vlm.config.image_tokens
        ranks = parallel.world()
        work = cards.work_of(cfg, stage, image_tokens, longest - image_tokens, ranks)
        planned.update(cards.memory_of(shape, work, cfg.parallel.shard, ranks, ranks, cfg.optim,
                                       twin=stage == "rl" and bool(cfg.algorithm.kl_coef), device=torch.device("cpu")))

    train.train_stage = measured
    train.Run.announce = announced
    train.compare_methods = lambda run: None
    memory.ROOMY = 0                # blocks get pages of their own, as where memory is short
    train.main(flags)


# ---------------------------------------------------------------- all of them

def run(words, ranks=1, threads=1):
    """Runs a program of ROOT on so many ranks; raises RuntimeError where it fails."""
    command = [sys.executable, *words]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def common_flags(folder, shape):
    """Flags of every run inside a folder: the STEPS of a shape, and rewards that differ."""
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    return [*STEPS, f"--rewards={reward}:varied:1", *shape]


def start(folder, size, flags):
    """A model that has not learned anything, of SIZES -> its checkpoint."""
    _, vocab = SIZES[size]
    run([__file__, "--begin", str(vocab), *flags, "--stage=clip,align", f"--out={folder / 'start'}"])
    return folder / "start" / "align.pt"


def measure(folder, size, counts, more=()):
    """[(ranks, stage, {part: bytes planned}, [bytes measured of each rank])] of numbers of ranks."""
    shape, _ = SIZES[size]
    flags = [*common_flags(folder, shape), "--threads=1", *more]
    init = start(folder, size, flags)
    found = []
    for ranks in counts:
        for stage in ("sft", "rl"):
            out = folder / f"{stage}-{ranks}"
            shard = "none" if ranks == 1 else "full"
            run([__file__, "--rank", str(out), *flags, f"--stage={stage}", f"--shard={shard}", f"--init={init}",
                 f"--out={out}"], ranks)
            of_ranks = [json.loads(Path(f"{out}-{rank}").read_text()) for rank in range(ranks)]
            found.append((ranks, stage, of_ranks[0][0], [peak for _, peak in of_ranks]))
    return found


def text(found):
    """The rows as a table, with the rank that held the most."""
    lines = [f"{'ranks':<6}{'stage':<6}{'planned, MiB':>13}{'measured, MiB':>15}{'planned / measured':>20}  by part"]
    for ranks, stage, planned, peaks in found:
        whole = sum(planned.values())
        parts = ", ".join(f"{name} {count / 2**20:.0f}" for name, count in planned.items() if count)
        lines.append(f"{ranks:<6}{stage:<6}{whole / 2**20:13.0f}{max(peaks) / 2**20:15.0f}{whole / max(peaks):20.2f}  "
                     f"{parts}")
    return "\n".join(lines)


def main(argv):
    if argv[:1] == ["--begin"]:
        return begin(int(argv[1]), argv[2:])
    if argv[:1] == ["--rank"]:
        return be_a_rank(argv[1], argv[2:])
    size = "small" if "--small" in argv else "large"
    counts = [int(word) for word in argv if word.isdecimal()] or [1, 2, 4]
    with tempfile.TemporaryDirectory() as folder:
        print(text(measure(Path(folder), size, counts)))


if __name__ == "__main__":
    main(sys.argv[1:])
