"""The plan of memory (model/memory.py) beside what the stages of a run take on this CPU, as a table.

    python tests/measure_memory.py                  # the embedded run
    python tests/measure_memory.py --llm=DIR        # a decoder with LoRA, on drawn pictures of things

Each stage runs a few steps in a process of its own, and its peak is the most that it held at any time less what a
process holds that has imported what train.py imports. Completions are as long as they may be and all rewards differ,
as the plan has it. Linux only.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("clip", "align", "sft", "cot", "rl")
STEPS = [f"--{stage}-steps={2 if stage == 'rl' else 4}" for stage in STAGES]
LORA = ["--lora-rank=16", "--lora-targets=all", "--batch=8", "--align-batch=8", "--rl-batch=8", "--group=8",
        "--max-new=32", "--align-epochs=0", "--sft-epochs=0"]
REWARD = "import zlib\n\n\ndef varied(sample, text):\n    return zlib.crc32(text.encode()) / 2**32\n"

# The peak is reset before each stage. The comparison afterwards is left out. Blocks get pages of their own, as where
# memory is short: the plan counts those to a few per cent, and of the holes in a heap only the most there may be.
PROGRAM = """
import json, re, sys
from pathlib import Path
import train

train.memory.ROOMY = 0

def held(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

bare = held("VmRSS")
train_stage = train.train_stage

def measured(run, stage, name, cfg):
    Path("/proc/self/clear_refs").write_text("5")
    train_stage(run, stage, name, cfg)
    print("measured", json.dumps([name, held("VmHWM") - bare]), flush=True)

train.train_stage = measured
train.compare_methods = lambda run: None
train.main(sys.argv[1:])
"""


def run_stages(flags):
    """Runs train.py with these flags in a process -> [(stage, bytes planned, bytes measured)]."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    planned = {}
    found = []
    for line in done.stdout.splitlines():
        plan = re.match(r"  (\w+) +memory +([\d.]+) (GiB|MiB) planned: (.*)", line)
        if plan:
            planned[plan[1]] = float(plan[2]) * {"MiB": 2 ** 20, "GiB": 2 ** 30}[plan[3]]
        if line.startswith("measured "):
            stage, peak = json.loads(line.removeprefix("measured "))
            found.append((stage, planned[stage], peak))
    return found


def measure(folder, flags, first=(), together=("clip",)):
    """[(stage, bytes planned, bytes measured)] of all STAGES in runs inside `folder`. first: flags of the run that
    holds the stages `together`; the others start from the checkpoint of the stage before."""
    (folder / "reward.py").write_text(REWARD)
    common = [*flags, *STEPS, "--threads=1"]
    sampled = [f"--rewards={folder / 'reward.py'}:varied:1", "--gated=False"]
    found = run_stages([*common, *first, f"--stage={','.join(together)}", f"--out={folder / 'first'}"])
    checkpoint = folder / "first" / f"{together[-1]}.pt"
    for stage in STAGES[len(together):]:
        more = [*sampled, "--min-new=32"] if stage == "rl" else []
        found += run_stages([*common, *more, f"--stage={stage}", f"--init={checkpoint}", f"--out={folder / stage}"])
        checkpoint = folder / stage / f"{stage}.pt"
    return found


def with_decoder(folder, llm, flags=()):
    """`measure` for a pretrained decoder with LoRA: CLIP from nothing, a few pictures with a reasoning each."""
    from draw_folder import draw_folder
    lines = []
    for path in sorted(draw_folder(folder / "pictures", per_class=20).rglob("*.*")):
        name = path.parent.name
        lines.append(json.dumps(dict(image=str(path), question="What is in the picture?", answer=name,
                                     reasoning=f"its outline and its colours are those of a {name}, so it is one.")))
    (folder / "things.jsonl").write_text("\n".join(lines))
    flags = [f"--data=jsonl:{folder / 'things.jsonl'}", "--preset=llava", *LORA, *flags]
    return measure(folder, flags, [f"--llm={llm}"], ("clip", "align"))


def text(found):
    """The rows as a table."""
    lines = [f"{'stage':<8}{'planned, MiB':>14}{'measured, MiB':>15}{'planned / measured':>20}"]
    for stage, planned, peak in found:
        lines.append(f"{stage:<8}{planned / 2**20:14.0f}{peak / 2**20:15.0f}{planned / peak:20.2f}")
    return "\n".join(lines)


def main(argv):
    with tempfile.TemporaryDirectory() as folder:
        llm = [flag.removeprefix("--llm=") for flag in argv if flag.startswith("--llm=")]
        if llm:
            print(text(with_decoder(Path(folder), llm[0])))
        else:
            print(text(measure(Path(folder), [])))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests")]
    main(sys.argv[1:])
