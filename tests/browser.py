"""A headless Chromium over the DevTools protocol, on two pipes: no package is needed.

    with Browser() as browser:
        page = browser.open(path)                   # a file, loaded
        page.run("document.title")                  # the value of an expression
        page.said                                   # console errors, exceptions, refusals by the page's policy
"""
import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)
MISSING = "there is no Chromium here: apt-get install chromium"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
         "--no-first-run", "--disable-extensions", "--disable-background-networking",
         "--host-resolver-rules=MAP * ~NOTFOUND")
PATIENCE = 120              # seconds that an answer is waited for


class Browser:
    def __enter__(self):
        for attempt in range(3):        # on a machine under load one in many never begins to answer
            self.start()
            try:
                self.send("Browser.getVersion", patience=40)
                return self
            except TimeoutError:
                self.kill()
        raise TimeoutError("three browsers said nothing for 40 s each")

    def start(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()
        # Beyond 3 and 4, onto which the browser's ends are put.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]

        def connect():
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [PATH, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"]
        self.process = subprocess.Popen(command, preexec_fn=connect, pass_fds=(3, 4), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self.buffer = b""
        self.number = 0
        self.events = []

    def __exit__(self, *_):
        with suppress(OSError, TimeoutError, subprocess.TimeoutExpired):
            self.send("Browser.close", patience=20)
            self.process.wait(20)
        self.kill()

    def kill(self):
        """Ends the browser, if it has not ended, and all processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for end in (self.to, self.back):
            os.close(end)
        self.folder.cleanup()

    def send(self, method, session=None, patience=PATIENCE, **params):
        """-> the result of a command; events that come before it are kept."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params)
        if session:
            message["sessionId"] = session
        text = json.dumps(message).encode() + b"\0"
        while text:
            text = text[os.write(self.to, text):]
        while True:
            answer = self.receive(patience)
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def receive(self, patience):
        until = time.monotonic() + patience
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the browser said nothing for {patience} s")
            more = os.read(self.back, 2 ** 20)
            if not more:
                raise OSError("the browser is gone")
            self.buffer += more
        text, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(text)

    def open(self, path, theme="light", width=1280, height=800):
        """Loads a file in a page of its own."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session, target, path, theme, width, height)


class Page:
    def __init__(self, browser, session, target, path, theme, width, height):
        self.browser = browser
        self.session = session
        self.target = target
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=theme)])
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def send(self, method, **params):
        return self.browser.send(method, self.session, **params)

    def run(self, expression):
        """The value of an expression; a promise is waited for. Raises AssertionError where it throws."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression):
        """Until an expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.run(expression):
            assert time.monotonic() < until, expression
            time.sleep(0.02)

    def frame(self):
        """Until what was asked for is painted."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def press(self, key):
        """A key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" and len(key) == 1 else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def hover(self, selector):
        """The mouse onto the middle of the first element that a selector finds."""
        middle = "[box.left + box.width / 2, box.top + box.height / 2]"
        x, y = self.run(f"((box) => {middle})(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def shot(self, path):
        self.frame()
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    @property
    def said(self):
        """What the page complained about so far, and every address beyond the file that it asked for."""
        self.run("1")
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"])
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(params["args"])
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"])
            elif event["method"] == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    found.append(url)
        return found

    def close(self):
        self.browser.send("Target.closeTarget", targetId=self.target)
