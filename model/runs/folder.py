"""What a run leaves on disk: config.json, log.jsonl, tokenizer.model, a checkpoint a stage, results.

    NAME.pt        a finished stage: weights, tokenizer, config, FLOPs, how long the log was
    progress.pt    the stage under way: weights, optimizer, random state, step, how long the log was; of weights in
                   shards it names the folder beside it that holds weights and optimizer (model/runs/shards.py)
    lock           locked by the process that works here, which its text names

Whatever moment a run is killed at, `reopen` finds the last whole state: finished stages are not repeated, the stage
under way goes on at its last checkpoint, and log lines written after it are cut off, to be written again. Of several
ranks (model/parallel.py) the first writes and holds the lock; all read.
"""
import hashlib
import json
import os
import socket
import time
from pathlib import Path

from model import parallel
from model.runs import checkpoint, shards
from model.runs.config import flag

try:
    import fcntl
except ImportError:         # Windows: nothing keeps a second process out of a run folder there
    fcntl = None


def write_json(path, value):
    checkpoint.write_bytes(path, json.dumps(value, indent=0).encode())


def read_config(folder):
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is damaged; the run cannot be resumed")
    return config


def resumed(given):
    """Flags given -> with --resume the config of the run that it means, else None. Ranks that torchrun has started
    again resume what is in --out."""
    if parallel.is_restart() and given.get("out") and (Path(given["out"]) / "config.json").exists():
        given["resume"] = True
    if not given.get("resume"):
        return None
    folder = choose(given.get("out", ""), "", resume=True)
    given["out"] = str(folder)
    return read_config(folder)


def digest(samples):
    """Tells whether a folder or file of one's own still holds the same samples in the same order."""
    rows = [(sample.id, sample.split, sample.question, sample.answer) for sample in samples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def choose(out, name, resume):
    """--out, or a new numbered folder under out/; to resume, the named one or the newest that has no results yet.

    Never one that holds a run, but to resume it.
    """
    if out:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out={out} must be a folder, it is a file")
    elif resume:
        folder = newest_unfinished(Path("out"))
    else:
        folder = next_free(Path("out"), name)
    exists = (folder / "config.json").exists()
    if not resume and (exists or any(folder.glob("*.pt"))):     # a stage would take a stray clip.pt for its own
        raise ValueError(f"--out={folder} already holds a run; add --resume to go on with it or choose another folder")
    if resume and not exists:
        raise ValueError(f"--out={folder} holds no run to --resume")
    return folder


def newest_unfinished(root):
    """The run folder under `root` that was begun last of those without results."""
    configs = [path for path in root.glob("*/config.json") if not (path.parent / "results.json").exists()]
    if not configs:
        raise ValueError(f"--resume found no unfinished run under {root}/; name its folder with --out=DIR")
    return max(configs, key=lambda path: path.stat().st_mtime).parent


def next_free(root, name):
    """root/name-N with the smallest N that does not exist yet."""
    number = 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return root / f"{name}-{number}"


class RunFolder:
    """Use it in a `with`, or call `release`: what holds a folder keeps other processes out of it."""

    def __init__(self, folder, device="cpu"):
        self.folder = Path(folder)
        self.device = device
        self.is_writer = parallel.is_first()
        self.progress = None        # state of the stage under way, in a resumed run
        self.board = None           # TensorBoard's writer
        self.lock = None            # the open lock file

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
        if not self.is_writer:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--out={self.folder} cannot be made: {error.strerror}") from None
        self.hold()
        if (self.folder / "config.json").exists():      # since `choose`, by a process that was a little faster
            raise ValueError(f"--out={self.folder} already holds a run; choose another folder")
        write_json(self.folder / "config.json", config | {"data_digest": digest(samples)})

    def reopen(self, config, defaults, free, stages, samples=()):
        """Checks that the run was started with this config (but for the options `free`) on these samples, and takes up
        its state.

        defaults: {option: value}, for options that the version which began the run did not have. Raises ValueError when
        the config or the samples are others, when another process works on the run, or when its log has lost lines that
        its checkpoints count on.
        """
        if self.is_writer:
            self.hold()
        before = defaults | read_config(self.folder)
        for name, value in config.items():
            if name not in free and before[name] != value:
                raise ValueError(f"{flag(name)}={value} must be {before[name]}, as in the run in {self.folder} that "
                                 "--resume goes on with")
        if before.get("data_digest") != digest(samples):
            raise ValueError(f"--data={config['data']} must hold what it held when the run in {self.folder} began: put "
                             "it back as it was, or, if nothing in it has changed, start a new run, since an older "
                             "version of this code that read its splits otherwise began that one")
        self._take_up(stages)

    def _take_up(self, stages):
        """The state of the stage under way; cuts off log lines that were written after the last checkpoint."""
        done = [stage for stage in stages if self.path(stage).exists()]
        log_bytes = checkpoint.load(self.path(done[-1]))["log_bytes"] if done else 0
        path = self.folder / "progress.pt"
        if path.exists():
            self.progress = checkpoint.load(path, self.device)
            if self.progress["stage"] in done:
                self.progress = None        # killed between finishing a stage and removing its progress
            else:
                log_bytes = self.progress["log_bytes"]
        if self.log_bytes() < log_bytes:
            raise ValueError(f"{str(self.log_path)!r} has {self.log_bytes()} bytes and must have at least {log_bytes}, "
                             "as when the run's last checkpoint was written; put it back, or start a new run")
        parallel.barrier()          # all have read how long it is
        if self.is_writer and self.log_path.exists():
            os.truncate(self.log_path, log_bytes)

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
                check_init(init, state, stage, origins[stage])
            elif origins[stage] and not {*ready, state["stage"]} & {*origins[stage]}:
                raise ValueError(f"--stage={','.join(stages)}: {stage} starts from {' or '.join(origins[stage])}; put "
                                 "that before it, or name its checkpoint with --init=")
            for other in budgets[stage]:
                if other not in ready:
                    raise ValueError(f"--stage={','.join(stages)}: {stage} is given the FLOPs that {other} took; put "
                                     f"{other} before it")
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
        if not self.is_writer:
            return
        if self.board and "step" in line:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
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
        """Writes the stage's checkpoint; from now on a resumed run goes on after it. All ranks return once it is
        there."""
        checkpoint.save(self.path(stage), dict(state, stage=stage, log_bytes=self.log_bytes()))
        if self.is_writer:
            (self.folder / "progress.pt").unlink(missing_ok=True)
        shards.remove(self.folder)
        parallel.barrier()

    def save_progress(self, stage, step, module, optimizer, meter, generator):
        """Writes the stage under way, of which `step` steps are done; what is frozen is left out."""
        frozen = self._frozen(module)
        weights = {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}
        saved = dict(module=weights, optimizer=optimizer.state_dict())
        if shards.are_in(weights):
            saved = shards.save(self.folder, step, weights, saved["optimizer"])
        checkpoint.save(self.folder / "progress.pt", dict(
            saved, stage=stage, step=step, flops=meter.total,
            generator=generator.get_state() if generator else None, log_bytes=self.log_bytes()))
        shards.remove(self.folder, saved.get("shards"))

    @staticmethod
    def _frozen(module):
        """Names of what stands still in a stage, and is had again from where the stage started; a reference may not."""
        return {name for name, p in module.named_parameters() if not p.requires_grad and "reference." not in name}

    def take_progress(self, stage, module, optimizer, meter, generator):
        """Puts an interrupted stage back to its last checkpoint -> the step to go on with, 0 of a new one."""
        state = self.progress
        self.progress = None
        if not state or state["stage"] != stage:
            return 0
        weights = module.state_dict()
        in_shards = shards.are_in(weights)
        if "shards" in state:
            state["module"], of_optimizer = shards.load(self.folder, state, weights, optimizer)
        elif in_shards:
            state["module"], of_optimizer = shards.spread((state["module"], state["optimizer"]["state"]), weights,
                                                          optimizer)
        if in_shards or "shards" in state:      # the groups of this number of ranks: the settings are the same
            state["optimizer"] = optimizer.state_dict() | dict(state=of_optimizer)
        shards.check(self.folder / "progress.pt", state["optimizer"]["state"], optimizer)
        missing, odd = module.load_state_dict(state["module"], strict=False)
        if odd or {*missing} - self._frozen(module):
            raise ValueError(f"{self.folder / 'progress.pt'} is of another model; remove it to begin {stage} anew")
        optimizer.load_state_dict(state["optimizer"])
        if generator:
            generator.set_state(state["generator"].cpu())
        meter.total = state["flops"]
        meter.agreed = meter.total
        return state["step"]


def check_init(init, state, stage, origins):
    """Raises ValueError unless `stage`, which starts from the stages `origins`, can start from the checkpoint `init`,
    whose content is `state`."""
    if not origins:
        raise ValueError(f"--init={init} has no effect on --stage={stage}, which starts from nothing")
    clip_will_do = origins == ("clip",)
    has_model = "vlm" in state or clip_will_do and "clip" in state
    if "tokenizer" in state and has_model:
        return
    lacks = "CLIP" if clip_will_do else "vision-language"
    if "tokenizer" not in state:
        lacks = f"tokenizer or {lacks}"
    raise ValueError(f"--init={init} cannot start --stage={stage}: it is the checkpoint of stage {state['stage']!r} "
                     f"and holds no {lacks} model")
