"""What a run leaves on disk: config.json, log.jsonl, tokenizer.model, a checkpoint a stage, results.

    NAME.pt        a finished stage: weights, tokenizer, config, FLOPs, how long the log was
    progress.pt    the stage under way: weights, optimizer, random state, step, how long the log was
    lock           locked by the process that works here, which its text names

Whatever moment a run is killed at, `reopen` finds the last whole state: finished stages are not repeated, the stage
under way goes on at its last checkpoint, and log lines written after it are cut off, to be written again.
"""
import hashlib
import json
import os
import socket
import time
from pathlib import Path

from model.runs import checkpoint

try:
    import fcntl
except ImportError:         # Windows: nothing keeps a second process out of a run folder there
    fcntl = None


def write_json(path, value):
    checkpoint.write_atomically(path, lambda file: file.write(json.dumps(value, indent=0).encode()))


def read_config(folder):
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is damaged; the run cannot be resumed")
    return config


def resumed(given):
    """Flags given -> with --resume the config of the run it means, else None."""
    if not given.get("resume"):
        return None
    folder = choose(given.get("out", ""), "", True)
    given["out"] = str(folder)
    return read_config(folder)


def digest(samples):
    """Tells whether a folder or file of one's own still holds the same samples in the same order."""
    return hashlib.sha256(json.dumps([(s.id, s.split, s.question, s.answer) for s in samples]).encode()).hexdigest()


def choose(out, name, resume):
    """--out, or a new numbered folder under out/; to resume, the named one or the newest that has no results yet.

    Never one that holds a run, but to resume it.
    """
    if out:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out={out} must be a folder, it is a file")
    else:
        root = Path("out")
        found = sorted((path for path in root.glob("*/config.json") if not (path.parent / "results.json").exists()),
                       key=lambda path: path.stat().st_mtime)
        if resume and not found:
            raise ValueError(f"--resume found no unfinished run under {root}/; name its folder with --out=DIR")
        number = 1
        while (root / f"{name}-{number}").exists():
            number += 1
        folder = found[-1].parent if resume else root / f"{name}-{number}"
    exists = (folder / "config.json").exists()
    if not resume and (exists or any(folder.glob("*.pt"))):     # a stage would take a stray clip.pt for its own
        raise ValueError(f"--out={folder} already holds a run; add --resume to go on with it or choose another folder")
    if resume and not exists:
        raise ValueError(f"--out={folder} holds no run to --resume")
    return folder


class RunFolder:
    """Use it in a `with`, or call `release`: what holds a folder keeps other processes out of it."""

    def __init__(self, folder, device="cpu"):
        self.folder, self.device, self.progress, self.board = Path(folder), device, None, None
        self.lock = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def hold(self):
        """Keeps the folder for this process alone until `release`, or its end, however that comes. Raises ValueError
        that says who holds it, when another process does."""
        lock = open(self.folder / "lock", "a+")
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise ValueError(f"--out={self.folder} is in use by {holder}; wait for its end, or choose another "
                             "folder") from None
        except OSError:         # some network file systems have no locks; a run goes on without
            pass
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        lock.flush()
        self.lock = lock

    def release(self):
        if self.lock is not None:
            self.lock.truncate(0)
            self.lock.close()
            self.lock = None

    def path(self, stage):
        return self.folder / f"{stage}.pt"

    def create(self, config, samples=()):
        """config: dict of all fields; samples: those of one's own pictures or records."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--out={self.folder} cannot be made: {error.strerror}") from None
        self.hold()
        if (self.folder / "config.json").exists():      # since `choose`, by a process that was a little faster
            raise ValueError(f"--out={self.folder} already holds a run; choose another folder")
        write_json(self.folder / "config.json", config | {"data_digest": digest(samples)})

    def reopen(self, config, free, stages, samples=()):
        """Checks that the run was started with this config (but for the fields `free`) on these samples, and takes up
        its state. Raises ValueError when it was not, when another process works on it, or when its log has lost lines
        that its checkpoints count on."""
        self.hold()
        before = read_config(self.folder)
        for name, value in config.items():
            if name not in free and before.get(name) != value:
                raise ValueError(f"--{name.replace('_', '-')}={value} must be {before.get(name)}, as in the run in "
                                 f"{self.folder} that --resume goes on with")
        if before.get("data_digest") != digest(samples):
            raise ValueError(f"--data={config['data']} must hold what it held when the run in {self.folder} began; "
                             "put it back as it was, or start a new run")
        done = [stage for stage in stages if self.path(stage).exists()]
        known = checkpoint.load(self.path(done[-1]))["log_bytes"] if done else 0
        if (self.folder / "progress.pt").exists():
            self.progress = checkpoint.load(self.folder / "progress.pt", self.device)
            if self.progress["stage"] in done:
                self.progress = None        # killed between finishing a stage and removing its progress
            else:
                known = self.progress["log_bytes"]
        if self.log_bytes() < known:
            raise ValueError(f"{str(self.log_path)!r} has {self.log_bytes()} bytes and must have at least {known}, as "
                             "when the run's last checkpoint was written; put it back, or start a new run")
        if self.log_path.exists():
            os.truncate(self.log_path, known)

    def check_origins(self, stages, origins, budgets, init):
        """Raises ValueError unless every one of `stages` will find what it starts from.

        origins: stage -> stages it may start from, one of which must have run before it (none: it starts from
        nothing); the first may start from the checkpoint `init` instead, others if it is of such a stage. budgets:
        stage -> stages whose cost it is given, all of which must have run before it.
        """
        ready = {stage for stage in origins if self.path(stage).exists()}
        state = checkpoint.load(init) if init else {"stage": None}
        for stage in stages:
            if stage == stages[0] and init:
                if not origins[stage]:
                    raise ValueError(f"--init={init} has no effect on --stage={stage}, which starts from nothing")
                wanted = ("vlm", "clip") if origins[stage] == ("clip",) else ("vlm",)
                if "tokenizer" not in state or not any(name in state for name in wanted):
                    lacks = ["" if "tokenizer" in state else "tokenizer or ",
                             "CLIP" if "clip" in wanted else "vision-language"]
                    raise ValueError(f"--init={init} cannot start --stage={stage}: it is the checkpoint of stage "
                                     f"{state['stage']!r} and holds no {''.join(lacks)} model")
            elif origins[stage] and not {*ready, state["stage"]} & set(origins[stage]):
                raise ValueError(f"--stage={','.join(stages)}: {stage} starts from {' or '.join(origins[stage])}; put "
                                 "that before it, or name its checkpoint with --init=")
            if missing := [other for other in budgets[stage] if other not in ready]:
                raise ValueError(f"--stage={','.join(stages)}: {stage} is given the FLOPs that {missing[0]} took; put "
                                 f"{missing[0]} before it")
            ready.add(stage)

    def spent(self, stages):
        """Measured matmul FLOPs of finished stages."""
        return sum(checkpoint.load(self.path(stage))["flops"] for stage in stages)

    @property
    def log_path(self):
        return self.folder / "log.jsonl"

    def log_bytes(self):
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def log(self, **line):
        """A line of log.jsonl; its numbers go to the board as well, if there is one."""
        if self.board:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step" and "step" in line:
                    self.board.add_scalar(f"{line['stage']}/{name}", value, line["step"])
        try:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"cannot write {str(self.log_path)!r}: {error.strerror}; what was saved before is intact; "
                          "--resume goes on from there") from None

    def open_board(self):
        """From now on log lines go to tensorboard/ too. Raises ValueError without the package."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError('--tensorboard needs the package: pip install -e ".[report]"') from None
        self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def finish(self, stage, **state):
        """Writes the stage's checkpoint; from now on a resumed run goes on after it."""
        checkpoint.save(self.path(stage), dict(state, stage=stage, log_bytes=self.log_bytes()))
        (self.folder / "progress.pt").unlink(missing_ok=True)

    def save_progress(self, stage, step, module, optimizer, generator, flops):
        frozen = self._frozen(module)
        checkpoint.save(self.folder / "progress.pt", dict(
            stage=stage, step=step, module={n: t for n, t in module.state_dict().items() if n not in frozen},
            optimizer=optimizer.state_dict(), flops=flops,
            generator=generator.get_state() if generator else None, log_bytes=self.log_bytes()))

    @staticmethod
    def _frozen(module):
        """Names of what stands still in a stage, and is had again from where the stage started; a reference may not."""
        return {name for name, p in module.named_parameters() if not p.requires_grad and "reference." not in name}

    def take_progress(self, stage, module, optimizer, generator):
        """Puts an interrupted stage back to its last checkpoint; -> (step to go on with, FLOPs so far), or None."""
        state, self.progress = self.progress, None
        if not state or state["stage"] != stage:
            return None
        missing, odd = module.load_state_dict(state["module"], strict=False)
        if odd or {*missing} - self._frozen(module):
            raise ValueError(f"{self.folder / 'progress.pt'} is of another model; remove it to begin {stage} anew")
        optimizer.load_state_dict(state["optimizer"])
        if generator:
            generator.set_state(state["generator"].cpu())
        return state["step"], state["flops"]
