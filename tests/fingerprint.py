"""What must not change when code only moves: hashes of tiny runs' checkpoints and logs, and their FLOPs as integers.

    python tests/fingerprint.py before.json                     # on the commit before
    python tests/fingerprint.py after.json --against=before.json    # after it: names what differs, exit code 1

Both on one machine, under one torch: other machines round otherwise. The runs are --compare=all from nothing; each
algorithm; adapters with KL; a LLaVA file; and a run that was killed and resumed.
"""
import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                        # noqa: E402

from llava_folder import write_models, write_records    # noqa: E402
from rl.algorithms import ALGORITHMS                # noqa: E402

# Enough chains of thought that completions differ, so that RL has something to learn from.
TINY = ["--preset=tiny", "--cot-steps=100", "--cot-lr=1e-2", "--forget-close=0.5", "--gated=False", "--max-new=24",
        "--threads=1"]
TIMES = ("seconds", "tokens_per_second", "update_tokens_per_second")


def start(out, *argv):
    command = [sys.executable, str(ROOT / "train.py"), *argv, f"--out={out}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(out, *argv):
    process = start(out, *argv)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(argv)} ended with {process.returncode}: {errors[-2000:]}")


def kill_after(out, lines, *argv):
    """Starts a run and kills it when its log has so many lines."""
    process, log = start(out, *argv), out / "log.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < lines:
        if process.poll() is not None:
            sys.exit(f"{out} ended before its log had {lines} lines: {process.communicate()[1][-2000:]}")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def flat(value, name=""):
    """Nested dicts of a checkpoint -> {dotted name: tensor}."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    found = {}
    for part, inner in value.items() if isinstance(value, dict) else ():
        found |= flat(inner, f"{name}.{part}")
    return found


def of_checkpoint(path):
    """-> [hash of all tensors with their names, dtypes and shapes, FLOPs]."""
    state = torch.load(path, weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in sorted(flat(state).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return [digest.hexdigest(), int(state["flops"])]


def of_log(path, folder):
    """-> {stage: hash of its lines without times}; what bad records say of `folder` is left out, its name is random."""
    digests = {}
    for text in path.read_text().splitlines():
        line = json.loads(text.replace(str(folder), ""))
        kept = {name: value for name, value in line.items() if not name.startswith(TIMES)}
        digests.setdefault(line["stage"], hashlib.sha256()).update(json.dumps(kept, sort_keys=True).encode())
    return {stage: digest.hexdigest() for stage, digest in digests.items()}


def of_run(out):
    checkpoints = {path.stem: of_checkpoint(path) for path in sorted(out.glob("*.pt"))}
    scores = hashlib.sha256((out / "results.json").read_bytes()).hexdigest()
    return {"checkpoints": checkpoints, "log": of_log(out / "log.jsonl", out.parent), "results": scores}


def fingerprint(folder):
    whole, basic = folder / "all", [*TINY, "--compare=basic"]
    run(whole, *TINY, "--compare=all")
    cot = f"--init={whole / 'cot.pt'}"
    run(folder / "algorithms", *TINY, cot, f"--stage={','.join(ALGORITHMS)}", "--epochs=2", "--mini-batches=2")
    run(folder / "adapters", *TINY, cot, "--stage=rl", "--lora-rank=2", "--lora-targets=all", "--kl-coef=0.05",
        "--epochs=2")
    data = folder / "llava-data"
    write_records(data)
    write_models(data)
    run(folder / "llava", "--preset=llava-1.5-7b", f"--clip={data / 'clip'}", f"--llm={data / 'llm'}", "--batch=4",
        "--align-batch=4", f"--data=llava:{data / 'records.json'}", f"--image-root={data / 'pictures'}",
        "--sft-epochs=2", "--sft-lr=1e-3", "--threads=1", "--save-every=3", "--max-length=200", "--template=vicuna_v1")
    for lines in (20, 140):             # in align; in reinforcement learning
        more = ["--resume"] if (folder / "resumed").exists() else []
        kill_after(folder / "resumed", lines, *basic, *more)
    run(folder / "resumed", *basic, "--resume")
    return {name: of_run(folder / name) for name in ("all", "algorithms", "adapters", "llava", "resumed")}


def leaves(value, name=""):
    """Nested dicts -> {dotted name: leaf}."""
    if not isinstance(value, dict):
        return {name: value}
    found = {}
    for part, inner in value.items():
        found |= leaves(inner, f"{name}.{part}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="where the fingerprint is written")
    parser.add_argument("--against", help="an earlier one to compare with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = fingerprint(Path(folder))
    Path(options.file).write_text(json.dumps(found, indent=1) + "\n")
    if options.against:
        now, before = leaves(found), leaves(json.loads(Path(options.against).read_text()))
        differ = [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]
        sys.exit("\n".join(f"differs: {name}" for name in differ) if differ else None)


if __name__ == "__main__":
    main()
