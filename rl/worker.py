"""A user's reward function in a process of its own, which can be killed when it hangs.

    brevity = Worker("mine.py", "brevity", timeout=5.0)
    brevity(sample, text)               # what mine.py's brevity(sample, text) returns; 0 when it raises or hangs

The function sees the sample's fields as attributes, pictures as paths or arrays. Requests and answers are lines of
JSON, so that nothing the function makes is ever unpickled here; what it prints goes to stderr.
"""
import base64
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START_SECONDS = 60              # for its imports
HANGS = 3                       # in a row, and it is given up: each costs its whole timeout
DIED = {"error": "its process died"}


class Worker:
    """Callable like any reward. failed: how often it raised, hung or returned no finite number; each kind of failure is
    printed once, with its sample and text."""

    def __init__(self, path, name, timeout=5.0, errors="zero"):
        if errors not in ("zero", "stop"):
            raise ValueError(f"--reward-errors={errors} must be zero or stop")
        self.path, self.name, self.timeout, self.errors = os.path.abspath(path), name, timeout, errors
        self.process, self.failed, self.hung, self.said = None, 0, 0, set()

    def __call__(self, sample, text):
        self.start()
        self._send(dict(sample=_plain(sample), text=text))
        answer = self._receive(self.timeout)
        self.hung = 0 if answer else self.hung + 1
        answer = answer or {"error": f"no answer within {self.timeout:g} s"}
        if "error" not in answer:
            return answer["value"]
        self.failed += 1
        said = (f"reward {self.name} of {self.path}: {answer['error']}; sample {sample.id or sample.question!r}, "
                f"text {text[:200]!r}")
        if self.hung or answer is DIED:
            self.close()
        if self.errors == "stop" or self.hung == HANGS:
            raise ValueError(said + (f"; {HANGS} times in a row" if self.hung == HANGS else ""))
        if answer["error"] not in self.said and len(self.said) < 10:
            self.said.add(answer["error"])
            print(f"  note: {said}; it counts 0", flush=True)
        return 0.0

    def is_for(self, path, timeout, errors):
        """Whether another of these arguments would do the same."""
        return (self.path, self.timeout, self.errors) == (os.path.abspath(path), timeout, errors)

    def start(self):
        """Raises ValueError when the file cannot be loaded; nothing when it is up already."""
        if self.process is not None:
            return
        program = f"import sys; sys.path.insert(0, {ROOT!r}); from rl.worker import serve; serve()"
        # A group of its own, so that what it starts is killed with it.
        self.process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        start_new_session=True)
        self.answers = queue.Queue()
        # A thread reads, because waiting on a pipe with a limit in time works differently everywhere.
        threading.Thread(target=_read, args=(self.process.stdout, self.answers), daemon=True).start()
        self._send(dict(path=self.path, name=self.name, timeout=self.timeout))
        answer = self._receive(START_SECONDS)
        if answer is None or "error" in answer:
            self.close()
            reason = answer["error"] if answer else f"nothing heard of it for {START_SECONDS} s"
            raise ValueError(f"reward {self.name} of {self.path} cannot be loaded: {reason}")

    def _send(self, message):
        try:
            self.process.stdin.write(json.dumps(message, default=_listed).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass                # it died; no answer will come

    def _receive(self, seconds):
        try:
            return self.answers.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self):
        if self.process is not None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process = None


def _read(stream, answers):
    for line in stream:
        answers.put(json.loads(line))
    answers.put(DIED)


def _plain(sample):
    """Sample -> what JSON can say."""
    images = [dict(shape=image.shape, bytes=base64.b64encode(image.tobytes()).decode())
              if hasattr(image, "tobytes") and hasattr(image, "shape") else str(image) for image in sample.images]
    return {**vars(sample), "images": images}


def _listed(value):
    """Arrays and numpy's numbers as JSON has them, anything else by its name."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _sample(fields):
    import numpy as np
    images = tuple(image if isinstance(image, str) else np.frombuffer(
        base64.b64decode(image["bytes"]), np.uint8).reshape(image["shape"]).copy() for image in fields["images"])
    return SimpleNamespace(**{**fields, "images": images})


def serve():
    """The worker's side: reads requests from stdin until it is closed."""
    import importlib.util
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)               # what the function prints must not end up among the answers

    def answer(**fields):
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    first = json.loads(sys.stdin.readline())
    try:
        sys.path.insert(0, os.path.dirname(first["path"]))
        spec = importlib.util.spec_from_file_location("reward_file", first["path"])
        module = sys.modules["reward_file"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, first["name"])
        answer(ready=True)
    except BaseException as error:      # whatever a user's file does, SystemExit too
        return answer(error=_line(error))
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):        # an orphan must not spin forever: the system ends it
            signal.setitimer(signal.ITIMER_REAL, 2 * first["timeout"] + 1)
        try:
            value = float(function(_sample(request["sample"]), request["text"]))
            answer(**({"value": value} if math.isfinite(value) else {"error": f"it returned {value}"}))
        except BaseException as error:
            answer(error=_line(error))
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
