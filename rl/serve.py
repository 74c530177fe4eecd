"""A model behind OpenAI's /v1/chat/completions: threads read requests, one worker answers them in turn.

    model = Model("embedded-1/rl", vlm, tokenizer, "brief", 32, generate)     # generate: model/generate.py's
    Server("127.0.0.1", 8000, model).run()

Each connection brings one request and is closed after its answer. Everything that a client can make grow has a bound
in rl/requests.py's Limits. `generate` is handed in, as samplers are in rl/rollout.py.
"""
import io
import json
import secrets
import select
import socket
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import NamedTuple

import torch

from data.chat import encode
from data.sample import collate, to_array
from rl.requests import Limits, Refused, Request, decode_picture, read_request
from rl.rollout import read
from rl.staged import stop_at

COLDEST = 0.01          # of sampling; colder is greedy
LINGER = 2.0            # seconds that a client has to close its side of an answered connection
ROUTES = {"/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}


# ---------------------------------------------------------------- the model

class Prompt(NamedTuple):
    """A request, tokenised. row: as `encode` gives it; max_tokens: of each of its answers."""
    request: Request
    row: tuple
    max_tokens: int


class Model:
    """name: what clients call it; template: of data.chat; max_new: tokens of an answer unless the client says."""

    def __init__(self, name, vlm, tokenizer, template, max_new, generate, limits=Limits()):
        self.name = name
        self.vlm = vlm
        self.tokenizer = tokenizer
        self.template = template
        self.max_new = max_new
        self.generate = generate
        self.limits = limits
        self.room = vlm.llm.config.window or limits.room        # tokens of prompt and answer
        self.created = int(time.time())

    def see(self, data):
        """Bytes of a picture -> the (size, size, 3) uint8 that the image tower sees; ValueError for no picture."""
        pixels = self.vlm.config.pixels
        picture = decode_picture(data, self.limits)     # an array stays out of to_array's cache
        return to_array(picture, pixels["image_size"], pixels["fit"], pixels["mean"])

    def read(self, body):
        """The body of a request -> Prompt. Raises Refused."""
        request = read_request(body, self.name, self.see, self.limits)
        try:
            row = encode(request.sample, self.tokenizer, self.vlm.config.image_tokens, "direct", self.template,
                         system=request.system)
        except ValueError as error:
            raise Refused(400, str(error)[:200], "messages") from None
        left = self.room - len(row[0])
        max_tokens = request.max_tokens or max(1, min(self.max_new, left))
        if max_tokens > left:
            raise Refused(400, f"the prompt's {len(row[0])} tokens and max_tokens={max_tokens} exceed the {self.room} "
                          "tokens that the model has room for", "max_tokens", "context_length_exceeded")
        if request.n * max_tokens > self.limits.sampled:
            raise Refused(400, f"n={request.n} answers of max_tokens={max_tokens} exceed the {self.limits.sampled} "
                          "tokens of one request", "max_tokens")
        return Prompt(request, row, max_tokens)

    def answer(self, prompt, is_over):
        """Prompt -> the JSON object of its answers. is_over: () -> whether nobody waits for them any more, asked at
        every token."""
        request = prompt.request
        tokenizer = self.tokenizer
        device = self.vlm.llm.head.device
        batch = collate([prompt.row], tokenizer.pad_id, **self.vlm.config.pixels).to(device)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        temperature = request.temperature if request.temperature >= COLDEST else 0.0
        completions, _ = self.generate(
            self.vlm, batch, request.n, prompt.max_tokens, tokenizer.eos_id, pad_id=tokenizer.pad_id,
            banned=tokenizer.banned(self.vlm.llm.config.vocab), temperature=temperature, top_p=request.top_p,
            generator=torch.Generator(device).manual_seed(seed), stop=_ends(tokenizer, request.stop, is_over))
        has_eos = ((completions.ids == tokenizer.eos_id) & completions.mask).any(-1)        # (1, n)
        choices = []
        for index, text in enumerate(read(completions, tokenizer)[0]):
            text, is_stopped = _cut(text, request.stop)
            reason = "stop" if is_stopped or has_eos[0, index] else "length"
            message = dict(role="assistant", content=text)
            choices.append(dict(index=index, message=message, finish_reason=reason))
        asked = len(prompt.row[0])
        sampled = int(completions.mask.sum())
        usage = dict(prompt_tokens=asked, completion_tokens=sampled, total_tokens=asked + sampled)
        return dict(id=f"chatcmpl-{secrets.token_hex(12)}", object="chat.completion", created=int(time.time()),
                    model=self.name, choices=choices, usage=usage)

    def listing(self):
        """The JSON object of /v1/models."""
        card = dict(id=self.name, object="model", created=self.created, owned_by="seethink")
        return dict(object="list", data=[card])


def _ends(tokenizer, stops, is_over):
    """A test for `generate`: which rows (R, t) of ids end here."""
    tests = [stop_at(tokenizer, text) for text in stops]

    def test(ids):
        ended = torch.full((len(ids),), is_over())
        for says in tests:
            ended |= says(ids)
        return ended
    return test


def _cut(text, stops):
    """-> (text up to the first of the stops in it, whether there was one)."""
    places = [text.index(stop) for stop in stops if stop in text]
    if not places:
        return text, False
    return text[:min(places)], True


# ---------------------------------------------------------------- the server

class Quota:
    """What all clients together may have `most` of; `message` tells one for whom there is none left."""

    def __init__(self, most, message):
        self.most = most
        self.message = message
        self.taken = 0
        self.lock = threading.Lock()

    def take(self, count=1):
        """Raises Refused when that is too many."""
        with self.lock:
            if self.taken + count > self.most:
                raise Refused(503, f"{self.message}, {self.most}; try again later")
            self.taken += count

    def give_back(self, count=1):
        with self.lock:
            self.taken -= count

    @contextmanager
    def held(self, count=1):
        self.take(count)
        try:
            yield
        finally:
            self.give_back(count)


class Server(ThreadingHTTPServer):
    """port 0: any free one. `run` serves until SIGINT; serve_forever, shutdown and `close` are for other threads."""
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host, port, model):
        self.model = model
        self.limits = model.limits
        self.connections = Quota(self.limits.connections, "as many connections are open as may be")
        self.bodies = Quota(self.limits.bodies, "other requests fill the bytes that bodies may take")
        self.waiting = Quota(self.limits.waiting + 1, "as many requests wait as may")    # one of them is answered
        self.reading = threading.Lock()         # one body at a time becomes objects, pictures and tokens
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.closing = threading.Event()
        super().__init__((host, port), Handler)
        self.url = f"http://{self.server_name}:{self.server_port}/v1"

    def server_bind(self):
        TCPServer.server_bind(self)             # HTTPServer's own asks a name server for the host's name
        self.server_name, self.server_port = self.server_address[:2]

    def run(self):
        print(f"serving {self.model.name} at {self.url}", flush=True)
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
        finally:
            self.close()

    def close(self):
        """Breaks the answer off that is being computed."""
        self.closing.set()
        self.server_close()
        self.worker.shutdown(cancel_futures=True)

    def ask(self, prompt, connection):
        """Waits for the worker -> the JSON object of the answers. Raises Refused."""
        with self.waiting.held():
            try:
                return self.worker.submit(self._answer, prompt, connection).result()
            except (CancelledError, RuntimeError):      # submitted before, and after, the worker's end
                raise Refused(503, "the server is shutting down") from None

    def _answer(self, prompt, connection):
        def is_over():
            return self.closing.is_set() or is_gone(connection)

        if is_over():
            raise Refused(503, "nobody waits for the answer")
        try:
            answer = self.model.answer(prompt, is_over)
        except Exception as error:              # whatever a model raises, the next request is answered
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise Refused(500, _failure(error)) from None
        if self.closing.is_set():
            raise Refused(503, "the server is shutting down")
        return answer

    def process_request(self, request, client_address):
        try:
            self.connections.take()
        except Refused as refused:
            self._turn_away(request, refused)
            return
        super().process_request(request, client_address)

    def _turn_away(self, request, refused):
        """Without a thread, and without waiting for anything."""
        try:
            request.settimeout(0)
            request.sendall(response(refused.status, _error(refused)))
            request.recv(2 ** 16)
        except OSError:
            pass
        super().shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.give_back()

    def shutdown_request(self, request):
        """Waits a little for the client to close first: closing over unread bytes may lose it the answer."""
        end = time.monotonic() + LINGER
        try:
            request.shutdown(socket.SHUT_WR)
            request.settimeout(LINGER)
            while time.monotonic() < end and request.recv(2 ** 16):
                pass
        except OSError:
            pass
        self.close_request(request)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):      # a client that is gone is no news
            print(f"a connection failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def is_gone(connection):
    """Whether the client has closed its side."""
    try:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0)) and not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


def _failure(error):
    words = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in words or "allocate memory" in words:
        return "the model ran out of memory; a smaller n, a smaller max_tokens or a shorter prompt needs less"
    return "the model failed on this request; the server's own output says why"


# ---------------------------------------------------------------- HTTP

def response(status, answer, allow="GET, POST"):
    """A status and a JSON object -> the bytes of a whole response."""
    body = json.dumps(answer).encode()
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json",
             f"Content-Length: {len(body)}", "Connection: close"]
    if status == 405:
        lines.append(f"Allow: {allow}")
    if status == 503:
        lines.append("Retry-After: 1")
    return "\r\n".join([*lines, "", ""]).encode() + body


def _error(refused):
    """Refused -> OpenAI's JSON object of an error."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    return dict(error=dict(message=refused.message, type=kind, param=refused.param, code=refused.code))


class _Timed(io.RawIOBase):
    """Reads a socket for some seconds in all, however slowly bytes come; Refused (408) after them."""

    def __init__(self, connection, seconds):
        self.connection = connection
        self.end = time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            self.connection.settimeout(max(0.001, self.end - time.monotonic()))
            return self.connection.recv_into(buffer)
        except TimeoutError:
            raise Refused(408, "the request did not arrive in time") from None


class Handler(BaseHTTPRequestHandler):
    """One request of one connection."""
    protocol_version = "HTTP/1.1"
    path = ""                       # until a request is read

    def setup(self):
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Timed(self.connection, self.server.limits.seconds))

    def handle(self):
        self.close_connection = True
        try:
            self.handle_one_request()
        except Refused as refused:
            self._send(refused.status, _error(refused))

    def do_GET(self):
        route = self._route("GET")
        self._send(200, dict(status="ok") if route == "/health" else self.server.model.listing())

    def do_POST(self):
        self._route("POST")
        self._send(200, self.server.ask(self._prompt(), self.connection))

    def _route(self, method):
        route = self.path.partition("?")[0]
        if route not in ROUTES:
            raise Refused(404, f"there is no {route[:60]!r} here; expected {', '.join(ROUTES)}")
        if ROUTES[route] != method:
            raise Refused(405, f"{route} must be asked by {ROUTES[route]}, not {method}")
        return route

    def _prompt(self):
        length = self._length()
        with self.server.bodies.held(length):
            body = self.rfile.read(length)
            if len(body) < length:
                raise Refused(400, f"the body ended after {len(body)} of {length} bytes")
            with self.server.reading:
                return self.server.model.read(body)

    def _length(self):
        """Bytes of the body, as the head of the request has them."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            raise Refused(411, "the request must have a Content-Length, and no Transfer-Encoding")
        is_count = lengths[0].isascii() and lengths[0].isdigit() and len(lengths[0]) < 19
        if len(lengths) > 1 or not is_count:
            raise Refused(400, "Content-Length must be one count of bytes")
        if int(lengths[0]) > self.server.limits.body:
            raise Refused(413, f"the body has {lengths[0]} bytes; expected at most {self.server.limits.body}")
        return int(lengths[0])

    def send_error(self, code, message=None, explain=None):
        """What http.server itself finds wrong with a request."""
        status = 405 if code == HTTPStatus.NOT_IMPLEMENTED else 400
        refused = Refused(status, f"this is no request that can be served: {str(message or code)[:200]}")
        self._send(status, _error(refused))

    def _send(self, status, answer):
        self.connection.settimeout(self.server.limits.seconds)
        allow = ROUTES.get(self.path.partition("?")[0], "GET, POST")
        self.wfile.write(response(status, answer, allow))

    def log_message(self, *args):
        """Nothing: what a client sends does not belong on the terminal."""
