"""The client of an OpenAI-compatible endpoint, on the standard library alone.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", "NAME", timeout=120, requests=0, failures=20)
    endpoint.reserve(1)
    answer = endpoint.chat([message("user", "What is shown?", images)], {"temperature": 0.5})
    answer.text, answer.finish_reason, answer.usage

The key is read from the environment variable OPENAI_API_KEY alone. It goes to the address that was
named and nowhere else: redirects are not followed, and it is cut out of whatever a server says.
`chat` may be called by many threads at once; after a 429 all of them pause.
"""
import base64
import email.utils
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from data.chat import IMAGE
from data.records import as_png

KEY = "OPENAI_API_KEY"
RETRIES = 5                 # of one request, after connections, timeouts, 5xx and nonsense
PAUSES = 20                 # of one request, after 429: a limit on the rate is no failure
LONGEST_PAUSE = 300.0       # seconds, whatever Retry-After says
LARGEST_REPLY = 2 ** 24     # bytes
FATAL = {401: "the key in OPENAI_API_KEY is missing or wrong", 403: "the key may not do this",
         404: "there is no such address or model"}
SENT_AS_IT_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
ORIENTATION = 0x0112        # EXIF's tag; 1 is upright


class Fatal(ValueError):
    """What ends a run: the next request could only fail as well."""


class OutOfRequests(Exception):
    """The run has sent as many requests as it may."""


class _Retry(Exception):
    """A request that may be sent again, after the `seconds` that the server asked for, or None;
    pause: whether all requests have to wait."""

    def __init__(self, problem, pause=False, seconds=None):
        super().__init__(problem)
        self.pause = pause
        self.seconds = seconds


@dataclass(frozen=True)
class Answer:
    """finish_reason: the endpoint's; "refusal" where the model or the endpoint declined; "failed"
    without an answer, which `error` explains. served: the model that the endpoint says it used."""
    text: str = ""
    finish_reason: str = ""
    usage: dict = field(default_factory=dict)
    served: str = ""
    error: str = ""


class Endpoint:
    """requests: sent at most, 0 for any number; failures: in a row, after which the run ends; wait:
    seconds before the first retry, doubled for each further one; timeout: seconds of a request."""

    def __init__(self, url, model, timeout=120.0, requests=0, failures=20, wait=0.5):
        self.url = checked_url(url)
        self.model = model
        self.timeout = timeout
        self.most_requests = requests
        self.most_failures = failures
        self.first_wait = wait
        self.sent = 0               # requests, retries among them
        self._reserved = 0          # requests that are still to be sent for questions under way
        self._key = key_from_environment()
        self._failed = 0            # requests in a row that came to nothing
        self._free_at = 0.0         # time.monotonic() at which the pause of all requests ends
        self._pauses = 0            # in a row
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._why = "the run has been stopped"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def chat(self, messages, parameters):
        """One completion of a reserved request -> Answer. Raises Fatal for what no further request
        could do better, and OutOfRequests where a retry would be one too many."""
        body = json.dumps({"model": self.model, "messages": messages, **parameters}).encode()
        failures = 0
        pauses = 0
        while True:
            self._take_turn(is_retry=failures + pauses > 0)
            try:
                answer = self._read(self._send(body))
            except _Retry as problem:
                failures += not problem.pause
                pauses += problem.pause
                if failures > RETRIES or pauses > PAUSES:
                    return self._lost(Answer(finish_reason="failed", error=str(problem)))
                if problem.pause:
                    self._pause_all(problem.seconds)
                else:
                    seconds = self.first_wait * 2 ** (failures - 1) * random.uniform(1, 1.5)
                    self._sleep(min(max(seconds, problem.seconds or 0.0), LONGEST_PAUSE))
                continue
            if answer.error:            # this request is refused for good; others may not be
                return self._lost(answer)
            with self._turn:
                self._failed = 0
                self._pauses = 0
            return answer

    def stop(self):
        """Wakes all threads that wait for their turn; no further request is sent."""
        self._stop.set()

    def reserve(self, count):
        """Sets so many requests aside, so that a question is not left halfway. Raises OutOfRequests
        where they are not left."""
        with self._turn:
            self._need_room(count)
            self._reserved += count

    def release(self, count):
        """Gives back what was set aside and not sent."""
        with self._turn:
            self._reserved -= count

    def _need_room(self, count):
        if self.most_requests and self.sent + self._reserved + count > self.most_requests:
            raise OutOfRequests

    # ------------------------------------------------------------ when to send

    def _take_turn(self, is_retry):
        """Waits for the end of a pause, then counts the request."""
        while True:
            with self._turn:
                left = self._free_at - time.monotonic()
                if left <= 0 and not self._stop.is_set():
                    if is_retry:
                        self._need_room(1)
                    else:
                        self._reserved -= 1
                    self.sent += 1
                    return
            self._sleep(left)

    def _sleep(self, seconds):
        if self._stop.wait(max(seconds, 0)):
            raise Fatal(self._why)

    def _pause_all(self, seconds):
        """No request is sent for `seconds`; without a number from the server, longer each time."""
        with self._turn:
            if seconds is None:
                seconds = self.first_wait * 2 ** min(self._pauses, 10)
            self._pauses += 1
            until = time.monotonic() + min(seconds, LONGEST_PAUSE)
            self._free_at = max(self._free_at, until)

    def _lost(self, answer):
        """Counts a request that came to nothing. Raises Fatal after too many in a row."""
        with self._turn:
            self._failed += 1
            failed = self._failed
        if failed >= self.most_failures:
            self._end(f"{failed} requests in a row came to nothing; the last one: {answer.error}")
        return answer

    def _end(self, problem):
        self._why = f"--teacher={self.url}: {problem}"
        self.stop()
        raise Fatal(self._why)

    # ------------------------------------------------------------ sending and reading

    def _send(self, body):
        """-> (status, the text of the reply). Raises Fatal, or _Retry."""
        headers = {"Content-Type": "application/json", "User-Agent": "seethink"}
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                return reply.status, self._text(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, self._problem(error)
        except urllib.error.URLError as error:
            raise _Retry(self._clean(f"no connection: {error.reason}")) from None
        except (http.client.HTTPException, OSError) as error:
            said = str(error) or type(error).__name__
            raise _Retry(self._clean(f"no whole reply: {said}")) from None

    def _text(self, reply):
        """The body; a server that sends it drop by drop, or without end, is cut off. Half a body is
        no valid JSON, which `_read` finds."""
        ends = time.monotonic() + self.timeout
        parts = []
        size = 0
        while True:
            part = reply.read1(2 ** 16)
            if not part:
                break
            parts.append(part)
            size += len(part)
            if size > LARGEST_REPLY:
                raise _Retry(f"a reply of more than {LARGEST_REPLY} bytes")
            if time.monotonic() > ends:
                raise _Retry(f"no whole reply within {self.timeout:g} s")
        return b"".join(parts).decode(errors="replace")

    def _problem(self, error):
        """HTTPError -> what its body says, in one line. Raises Fatal or _Retry by its status."""
        try:
            said = self._said(self._text(error))
        except (_Retry, http.client.HTTPException, OSError):
            said = ""
        problem = f"HTTP {error.code} {said}".strip()
        if error.code in FATAL:
            self._end(f"{problem}: {FATAL[error.code]}")
        if 300 <= error.code < 400:
            self._end(f"{problem}: it sends requests on to another address; name that one")
        if error.code in (408, 409, 429) or error.code >= 500:
            seconds = retry_after(error.headers.get("Retry-After"))
            raise _Retry(problem, pause=error.code == 429, seconds=seconds)
        return problem

    def _said(self, text):
        """The message of an error's body, at most 200 characters of it."""
        try:
            found = json.loads(text)
            found = found.get("error", found)
            if isinstance(found, dict):
                found = found.get("message", "")
        except (ValueError, AttributeError, RecursionError):
            found = text
        return " ".join(self._clean(str(found)).split())[:200]

    def _read(self, reply):
        """(status, text) -> Answer. Raises _Retry for what is no completion."""
        status, text = reply
        if status != 200:
            return Answer(finish_reason="refusal", error=text)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise _Retry("the reply is not valid JSON") from None
        try:
            choice = found["choices"][0]
            said = choice["message"]
            content = _words(said.get("content"))
            refusal = said.get("refusal")
        except (TypeError, KeyError, IndexError, AttributeError):
            raise _Retry(f"the reply holds no choices; {self._said(text)}") from None
        finish_reason = str(choice.get("finish_reason") or "")
        if refusal:
            content = content or str(refusal)
            finish_reason = "refusal"
        return Answer(self._clean(content), self._clean(finish_reason), _usage(found.get("usage")),
                      self._clean(str(found.get("model") or "")))

    def _clean(self, text):
        """Without the key, and without halves of surrogate pairs, which no file takes."""
        text = text.encode(errors="replace").decode()
        return text.replace(self._key, "[key]") if self._key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None             # the reply is then an HTTPError


def _words(content):
    """A message's content, a text or a list of parts -> text."""
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise TypeError
    return content


def _usage(found):
    """The two counts of tokens, 0 where the endpoint gives none."""
    counts = {}
    for name in ("prompt_tokens", "completion_tokens"):
        value = found.get(name) if isinstance(found, dict) else 0
        counts[name] = value if type(value) is int and value >= 0 else 0
    return counts


def retry_after(text):
    """The header's seconds or date -> seconds from now on; None for anything else.

    >>> retry_after("7"), retry_after("soon"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (7.0, None, 0.0)
    """
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    if seconds != seconds:
        return None
    return max(seconds, 0.0)


def checked_url(url):
    """The base address without its last slash. Raises ValueError unless it is http or https, a host
    and a path: what else stands in it may be secret and would be saved with the options."""
    expected = "be http://HOST/v1 or https://HOST/v1, without a password, query or fragment"
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port                      # raises for what is no number
    except ValueError:
        raise ValueError(f"--teacher must {expected}") from None
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ValueError(f"--teacher must {expected}")
    return url.rstrip("/")


def key_from_environment():
    """Raises ValueError, without its value, for a key that no header can hold."""
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"the environment variable {KEY} must hold printable ASCII characters "
                         "without spaces")
    return key


# ---------------------------------------------------------------- messages

def message(role, text, images=()):
    """A message with its pictures where <image> stands for them in the text, else in front."""
    if not images:
        return {"role": role, "content": text}
    pieces = text.split(IMAGE)
    if len(pieces) != len(images) + 1:
        pieces = ["" for _ in images] + [text]
    content = []
    for number, piece in enumerate(pieces):
        if piece.strip():
            content.append({"type": "text", "text": piece.strip()})
        if number < len(images):
            content.append({"type": "image_url", "image_url": {"url": data_url(images[number])}})
    return {"role": role, "content": content}


def data_url(picture):
    """A picture (path, encoded bytes or (H, W, 3) uint8 array) -> "data:image/..;base64,.."; its
    own bytes where servers read them the same way round, else as PNG."""
    kind, data = "image/png", None
    if not isinstance(picture, np.ndarray):
        kind, data = _own_bytes(picture)
    if data is None:
        kind, data = "image/png", as_png(picture)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _own_bytes(picture):
    """-> (media type, bytes) of an upright JPEG, PNG or WebP; ("", None) for any other."""
    data = picture
    try:
        if not isinstance(picture, bytes):
            with open(picture, "rb") as file:
                data = file.read()
        with Image.open(io.BytesIO(data)) as image:
            upright = image.getexif().get(ORIENTATION, 1) == 1
            if upright and image.format in SENT_AS_IT_IS:
                return SENT_AS_IT_IS[image.format], data
    except Exception:               # as_png names what is wrong
        pass
    return "", None
