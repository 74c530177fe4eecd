"""An endpoint on a real socket whose replies a test decides, and a teacher's file of questions for it."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from data.chat import staged_text
from data.sample import Sample
from data.teaching import RecordOptions

KEY = "sk-secret/0123456789"


def completion(text, finish_reason="stop", usage=(11, 7), **message):
    """What an endpoint answers, as a dict."""
    tokens_in, tokens_out = usage
    return {"model": "served-1", "choices": [{"message": {"content": text, **message}, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}}


def good(conclusion="two"):
    return completion(staged_text("a plan", "a picture", "so it is", conclusion))


def text_of(body):
    """The words of a request's first message."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def number_of(body):
    """i of the question "number i ?"."""
    return int(text_of(body).split("number ")[1].split()[0])


class Server:
    """with Server(reply) as server: server.url

    reply(body, n) for the n-th request (from 1 on): a dict, sent as JSON with status 200; (status, headers, bytes);
    "hang" for `hang` seconds; "cut", half a reply; "reset", none; "drip", a byte each 0.05 s. seen: the bodies; times:
    when they came; headers: theirs.
    """

    def __init__(self, reply, hang=1.0):
        self.reply = reply
        self.hang = hang
        self.seen, self.times, self.headers = [], [], []
        self.turn = threading.Lock()
        self.http = None

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.turn:
                    outer.seen.append(body)
                    outer.times.append(time.monotonic())
                    outer.headers.append(dict(self.headers))
                    number = len(outer.seen)
                outer.send(self, outer.reply(body, number))

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):         # a client that was killed
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def send(self, handler, reply):
        if isinstance(reply, dict):
            reply = 200, {}, json.dumps(reply).encode()
        handler.close_connection = True
        if reply == "hang":
            time.sleep(self.hang)
            return
        if reply == "reset":
            return
        if reply in ("cut", "drip"):
            reply, how = (200, {}, b"{" + b" " * 400), reply
        else:
            how = ""
        status, headers, data = reply
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if how == "cut":
            data = data[:7]
        if how != "drip":
            handler.wfile.write(data)
            return
        for byte in data:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)


def picture(folder):
    """The path of a small PNG file."""
    path = folder / "picture.png"
    if not path.exists():
        Image.fromarray(np.full((6, 8, 3), 200, np.uint8)).save(path)
    return str(path)


def questions(count, folder):
    """Yields samples "number i ?" with the answer "two" and one picture for all."""
    path = picture(folder)
    for i in range(count):
        yield Sample(id=f"q{i}", images=(path,), question=f"number {i} ?", answer="two", split="train")


def options(**values):
    return RecordOptions(**{"teacher_model": "m", "teacher_tries": 1, "teacher_jobs": 2, "teacher_timeout": 20.0,
                            **values})
