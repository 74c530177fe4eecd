"""Many runs, each in a process of its own: one a seed, or whatever else differs."""
import os
import signal
import subprocess
import sys
import time

from model.runs.config import change, to_command_line


def run_seeds(script, cfg, seeds, folder):
    """Runs `script`, train.py, for each of the seeds, as `run_all`."""
    shared = one_run(cfg)
    run_all(script, {f"seed-{seed}": change(shared, seed=seed) for seed in seeds}, cfg.run.jobs, folder)


def one_run(cfg):
    """The config of a run by itself among --jobs at a time, which share the threads."""
    threads = cfg.machine.threads or max(1, (os.cpu_count() or 1) // cfg.run.jobs)
    return change(cfg, seeds=0, grid="", jobs=1, resume=False, threads=threads)


def run_all(script, configs, jobs, folder):
    """configs: {name: config}: runs `script` for each, `jobs` at a time, in sub-folders of `folder` of their names; one
    that was interrupted goes on. Raises ValueError about the first that stops otherwise than at its end; the others are
    then ended, too."""
    waiting = list(configs)
    running = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that the runs below end, too
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = start(script, configs[name], name, folder)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    check_end(process.returncode, name, folder)
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()


def start(script, cfg, name, folder):
    """-> the process of one run, which prints into NAME.txt."""
    out = folder / name
    cfg = change(cfg, out=str(out), resume=(out / "config.json").exists())
    command = [sys.executable, script, *to_command_line(cfg)]
    with open(folder / f"{name}.txt", "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def check_end(returncode, name, folder):
    """Prints that a run is done. Raises ValueError with its last line when it stopped before."""
    output = folder / f"{name}.txt"
    if returncode:
        lines = output.read_text(errors="replace").splitlines() or ["nothing"]
        raise ValueError(f"{name} stopped with exit code {returncode}, saying {lines[-1]!r} (all of it in {output}); "
                         f"--resume --out={folder} goes on")
    print(f"{name} done, see {output}", flush=True)
