"""environment.json: on what a run was made, an entry for each time that a process took up its folder.

An entry: started, command (arguments), commit ("" without git, "+ changes" behind it with uncommitted ones), machine,
processor, device, cores, threads, python, torch, numpy, notes (what the run was warned of at its start), differs (the
options that are not the defaults, {name: [value, default]}).
"""
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from model.runs.config import changed, flat
from model.runs.folder import write_json

ROOT = Path(__file__).resolve().parents[2]


def git(*words):
    """What a git command about this code says, in one line; "" where it cannot."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit():
    """The commit of this code, short; "" without git."""
    name = git("rev-parse", "--short=12", "HEAD")
    if name and git("status", "--porcelain", "--untracked-files=no"):
        name += " + changes"
    return name


def processor():
    """The name of the CPU as Linux has it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0]


def environment(cfg, device, notes=()):
    """An entry. cfg: a config; device: a torch device, or its name, "auto" too; notes: sentences."""
    name = str(device)
    if name.startswith("cuda"):
        name = f"{name}, {torch.cuda.get_device_name(device)}"
    defaults = flat(type(cfg)())
    return dict(
        started=time.strftime("%Y-%m-%d %H:%M:%S %z"), command=sys.argv[1:], commit=commit(),
        machine=f"{platform.system()} {platform.machine()}", processor=processor(), device=name,
        cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(),
        torch=torch.__version__, numpy=np.__version__, notes=list(notes),
        differs={option: [value, defaults[option]] for option, value in changed(cfg).items()
                 if option not in ("flags", "out", "resume")})


def add(folder, entry):
    """Appends an entry to the folder's environment.json. What is no list of a run's, as after a damaged disk, is begun
    anew."""
    path = Path(folder) / "environment.json"
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        entries = []
    write_json(path, [*entries, entry])
