"""One run a seed, each in a process of its own."""
import os
import signal
import subprocess
import sys
import time

from model.runs.config import change, to_command_line


def run_seeds(script, cfg, seeds, folder):
    """Runs `script`, train.py, for each of the seeds, --jobs at a time, in sub-folders of `folder`; one that was
    interrupted goes on. Raises ValueError about the first seed that stops otherwise than at its end; the others are
    then ended, too."""
    threads = cfg.machine.threads or max(1, (os.cpu_count() or 1) // cfg.run.jobs)
    shared = change(cfg, seeds=0, jobs=1, resume=False, threads=threads)
    waiting = list(seeds)
    running = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that the seeds below end, too
    try:
        while waiting or running:
            while waiting and len(running) < cfg.run.jobs:
                seed = waiting.pop(0)
                running[seed] = start_seed(script, shared, seed, folder)
            for seed, process in list(running.items()):
                if process.poll() is not None:
                    del running[seed]
                    check_end(process.returncode, seed, folder)
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()


def start_seed(script, cfg, seed, folder):
    """-> the process of one seed, which prints into seed-N.txt."""
    out = folder / f"seed-{seed}"
    cfg = change(cfg, seed=seed, out=str(out), resume=(out / "config.json").exists())
    command = [sys.executable, script, *to_command_line(cfg)]
    with open(folder / f"seed-{seed}.txt", "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def check_end(returncode, seed, folder):
    """Prints that a seed is done. Raises ValueError with its last line when it stopped before."""
    output = folder / f"seed-{seed}.txt"
    if returncode:
        lines = output.read_text(errors="replace").splitlines() or ["nothing"]
        raise ValueError(f"seed {seed} stopped with exit code {returncode}, saying {lines[-1]!r} (all of it in "
                         f"{output}); --resume --out={folder} goes on")
    print(f"seed {seed} done, see {output}")
