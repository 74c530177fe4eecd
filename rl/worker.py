"""A user's reward function in a process of its own, which can be killed when it hangs.

    brevity = Worker("mine.py", "brevity", timeout=5.0)
    brevity(sample, text)       # what mine.py's brevity(sample, text) returns; 0 when it fails

The function sees the sample's fields as attributes; a picture is what the sample holds: a path, the
bytes of an encoded picture (PNG, JPEG) or an (H, W, 3) uint8 array. Requests and answers are lines
of JSON, so that nothing the function makes is ever unpickled here; what it prints goes to stderr. A
request has a number that its answer repeats, so no value can end up at another completion.
"""
import base64
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START_SECONDS = 60              # for its imports
LOSSES = 3                      # processes lost in a row end the run: each costs a start
LONGEST = 65536                 # bytes of an answer; a longer line is no answer
LARGEST = 3.4028234e38          # rewards become fp32, where more is infinite
# What stands in place of an answer when the process can no longer be used.
DIED = {"error": "its process died"}
GARBLED = {"error": "it wrote into the pipe of its answers"}


class Worker:
    """Callable like any reward. Each kind of failure is printed once, with its sample and text.

    failed: how many calls raised, hung, killed the process or returned no finite number.

    Raises ValueError when the file cannot be loaded, when LOSSES processes in a row were lost, and
    at the first failure with errors "stop".
    """

    def __init__(self, path, name, timeout=5.0, errors="zero"):
        if errors not in ("zero", "stop"):
            raise ValueError(f"--reward-errors={errors} must be zero or stop")
        self.path = os.path.abspath(path)
        self.name = name
        self.timeout = timeout
        self.errors = errors
        self.process = None
        self.number = 0                 # of the last request
        self.failed = 0                 # calls
        self.lost = 0                   # processes in a row
        self.printed = set()            # the kinds of failure that were printed

    def __call__(self, sample, text):
        """-> what the function returns for this completion, 0.0 when it fails."""
        about = f"sample {sample.id or sample.question!r}, text {text[:200]!r}"
        if self.process is not None:
            error = self._meanwhile()
            if error:
                self._fail(f"{error} between two calls", f"before {about}", lost=True)
            else:
                self.lost = 0
        self.start()
        answer = self._ask(self.timeout, sample=_plain(sample), text=text)
        if not answer["error"]:
            return answer["value"]
        self.failed += 1
        if self.errors == "zero":
            about += "; it counts 0"
        self._fail(answer["error"], about, lost="number" not in answer)
        return 0.0

    def start(self):
        """Starts the process unless it runs. Raises ValueError if the file cannot be loaded."""
        if self.process is not None:
            return
        program = f"import sys; sys.path.insert(0, {ROOT!r}); from rl.worker import serve; serve()"
        # A group of its own, so that what it starts is killed with it.
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], bufsize=0, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True)
        self.requests = queue.Queue()
        self.answers = queue.Queue()
        # Threads read and write, because waiting on a pipe with a time limit works differently on
        # every system. Each closes its own pipe.
        write = self.process.stdin, self.requests
        read = self.process.stdout, self.answers
        threading.Thread(target=_write, args=write, daemon=True).start()
        threading.Thread(target=_read, args=read, daemon=True).start()
        answer = self._ask(START_SECONDS, path=self.path, name=self.name, timeout=self.timeout)
        if answer["error"]:
            self.close()
            error = answer["error"]
            raise ValueError(f"reward {self.name} of {self.path} cannot be loaded: {error}")

    def _meanwhile(self):
        """What is wrong with the process since it last answered; "" if nothing is."""
        if not self.answers.empty():
            return self.answers.get()["error"]
        return "" if self.process.poll() is None else DIED["error"]

    def _ask(self, seconds, **request):
        """-> the answer to this request: a dict of number, value and error.

        The error is empty where there is a value. An answer without a number means that the process
        can no longer be used.
        """
        self.number += 1
        line = json.dumps(dict(request, number=self.number), default=_listed)
        self.requests.put(line.encode() + b"\n")
        deadline = time.monotonic() + seconds
        while True:
            try:
                answer = self.answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return {"error": f"no answer within {seconds:g} s"}
            if answer.get("number", self.number) == self.number:
                return answer

    def _fail(self, error, about, lost):
        """Prints what went wrong, once for each kind, or raises it; ends a process that is lost."""
        message = f"reward {self.name} of {self.path}: {error}; {about}"
        if lost:
            self.lost += 1
            self.close()
        if self.lost >= LOSSES:
            raise ValueError(f"{message}; its process was lost {LOSSES} times in a row")
        if self.errors == "stop":
            raise ValueError(message)
        if error not in self.printed and len(self.printed) < 10:
            self.printed.add(error)
            print(f"  note: {message}", flush=True)

    def close(self):
        if self.process is None:
            return
        self.requests.put(b"")
        try:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        except (ProcessLookupError, PermissionError):
            pass        # it has ended, with all that it started: macOS then forbids the signal
        self.process.wait()
        self.process = None


def _write(pipe, lines):
    """Writes lines until an empty one."""
    with pipe:
        for line in iter(lines.get, b""):
            try:
                while line:
                    line = line[pipe.write(line):]
            except OSError:
                return                  # it died; no answer will come


def _read(pipe, answers):
    """Passes answers on until the first line that is no answer, or the end of the pipe.

    The pipe ends when all processes that hold it have closed it or died.
    """
    with io.BufferedReader(pipe) as lines:
        for line in iter(lambda: lines.readline(LONGEST), b""):
            answer = _answer(line)
            answers.put(answer)
            if answer is GARBLED:
                return
    answers.put(DIED)


def _answer(line):
    """A line of bytes -> the answer it holds, or GARBLED."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return GARBLED
    if not isinstance(answer, dict):
        return GARBLED
    types = {name: type(value) for name, value in answer.items()}
    if types != {"number": int, "value": float, "error": str}:
        return GARBLED
    return answer if abs(answer["value"]) <= LARGEST else GARBLED       # NaN compares False


def _plain(sample):
    """Sample -> what JSON can say."""
    return {**vars(sample), "images": [_packed(image) for image in sample.images]}


def _packed(image):
    """Path -> str; encoded picture -> {"bytes"}; array -> {"bytes", "shape"}; bytes in base64."""
    if isinstance(image, bytes):
        return dict(bytes=base64.b64encode(image).decode())
    if hasattr(image, "tobytes") and hasattr(image, "shape"):
        return dict(bytes=base64.b64encode(image.tobytes()).decode(), shape=image.shape)
    return str(image)


def _unpacked(image):
    """What `_packed` made -> a path, bytes or an (H, W, 3) uint8 array that can be written to."""
    import numpy as np
    if isinstance(image, str):
        return image
    data = base64.b64decode(image["bytes"])
    if "shape" not in image:
        return data
    return np.frombuffer(data, np.uint8).reshape(image["shape"]).copy()


def _listed(value):
    """Arrays and numpy's numbers as JSON has them, anything else by its name."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _sample(fields):
    """What `_plain` made -> an object with a sample's fields as attributes."""
    images = tuple(_unpacked(image) for image in fields["images"])
    return SimpleNamespace(**{**fields, "images": images})


class Pipes:
    """The worker's ends of its two pipes, moved away from stdin and stdout: those are left to the
    function, which may read, write and close them."""

    def __init__(self):
        self.requests = os.fdopen(os.dup(0), "rb")
        self.answers = os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)                   # what the function prints must not end up among the answers
        os.close(nothing)
        sys.stdout.reconfigure(line_buffering=True)     # nor be lost when the process is killed
        self.process = os.getpid()
        self.identity = self._identity()
        # A child left behind would keep the pipes open, and so hide that its parent died.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._close)

    def _close(self):
        for fd in (self.requests.fileno(), self.answers):
            try:
                os.close(fd)
            except OSError:
                pass

    def _identity(self):
        found = [os.fstat(fd) for fd in (self.requests.fileno(), self.answers)]
        return [(status.st_dev, status.st_ino) for status in found]

    def read(self):
        """-> the next request, or None when there will be no more."""
        line = self.requests.readline()
        return json.loads(line) if line else None

    def answer(self, number, value=0.0, error=""):
        """Answers a request. A process that the function forked ends here instead.

        So does one whose pipes the function closed: it could read no further request, and the next
        call would fail instead of this one.
        """
        line = json.dumps(dict(number=number, value=value, error=error)).encode() + b"\n"
        try:
            if os.getpid() == self.process and self._identity() == self.identity:
                os.write(self.answers, line)
                return
        except OSError:
            pass
        os._exit(1)


def serve():
    """The worker's side: reads requests from stdin until it is closed."""
    import importlib.util
    import numpy    # noqa: F401: before the clock of the first call runs
    pipes = Pipes()
    first = pipes.read()
    if first is None:
        return
    try:
        sys.path.insert(0, os.path.dirname(first["path"]))
        spec = importlib.util.spec_from_file_location("reward_file", first["path"])
        module = sys.modules["reward_file"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, first["name"])
        error = ""
    except BaseException as caught:     # whatever a user's file does, SystemExit too
        error = _line(caught)
    pipes.answer(first["number"], error=error)
    if error:
        return
    while (request := pipes.read()) is not None:
        _limit(2 * first["timeout"] + 1)        # the system ends an orphan that would spin forever
        value, error = _call(function, request)
        pipes.answer(request["number"], value, error)
        _limit(0)
    # Threads and processes that the function left behind end here, too.
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def _limit(seconds):
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _call(function, request):
    """-> (value, error), one of them empty."""
    try:
        value = float(function(_sample(request["sample"]), request["text"]))
    except BaseException as caught:
        return 0.0, _line(caught)
    if not abs(value) <= LARGEST:
        return 0.0, f"it returned {value}"
    return value, ""


def _line(error):
    """An exception as one line that can be printed, even if its message cannot be made or has half
    a character."""
    name = type(error).__name__
    try:
        message = f"{name}: {error}"
    except BaseException:
        message = name
    line = message.splitlines()[0][:300]
    return line.encode(errors="backslashreplace").decode()
