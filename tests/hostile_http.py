"""What a client can do to an HTTP server: requests with the status that each must get, and random damage.

    python tests/hostile_http.py PORT 1000      # against `eval.py --serve=PORT`; prints how many got which status
"""
import base64
import io
import json
import random
import socket
import struct
import sys
import time
import zlib
from collections import Counter

from PIL import Image

PATH = "/v1/chat/completions"


# ---------------------------------------------------------------- requests

def ask(text="what is at b2 ?", **fields):
    """The JSON object of a request."""
    return dict(messages=[dict(role="user", content=text)], temperature=0, max_tokens=4) | fields


def post(body, path=PATH, **headers):
    """The bytes of a POST; headers: Content_Type for Content-Type, None to leave one out."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    given = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(body)}
    for name, value in headers.items():
        given[name.replace("_", "-")] = value
    lines = [f"{name}: {value}" for name, value in given.items() if value is not None]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + body


def look_at(*urls, text="what ?"):
    """A request about pictures."""
    parts = [dict(type="image_url", image_url=dict(url=url)) for url in urls]
    return post(ask([*parts, dict(type="text", text=text)]))


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb(width, height):
    """A PNG of a few hundred bytes whose header declares width x height pixels."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10_000)))
            + chunk(b"IEND", b""))


PICTURE = encoded(Image.linear_gradient("L").resize((40, 23)).convert("RGB"))
WRONG = {       # field -> values that it must not have
    "n": (0, -1, 65, 1.5, "1", True, [], {}, 10 ** 19),
    "temperature": (-1, 2.5, "0", True, [0], {}),
    "top_p": (0, -1, 1.5, "x", False, [], {}),
    "max_tokens": (0, -5, 2 ** 40, 1.0, "9", True, []),
    "max_completion_tokens": (0, "x", {}),
    "stop": ("", 3, [""], ["a"] * 5, [1], {}, "x" * 300, True),
    "seed": ("x", 1.5, 2 ** 63, [], True),
    "messages": (None, [], "x", 3, {}, [1], [None], [[]], [{}], [{"role": "user"}], [{"role": 3, "content": "a"}],
                 [{"role": "user", "content": None}], [{"role": "user", "content": {"type": "text"}}],
                 [{"role": "user", "content": [{"type": "text", "text": 3}]}], [{"role": "user", "content": ["a"]}],
                 [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "tool", "content": "a"}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]}],
                 [{"role": "assistant", "content": "a"}], [{"role": "user", "content": "a"}] * 2,
                 [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                 [{"role": "system", "content": "a"}], [{"role": "system", "content": "a"}] * 2,
                 [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": "x" * 300_000}]),
    "stream": (True, 1, "yes", []),
    "tools": ([{"type": "function"}], "x"), "logprobs": (True,), "response_format": ({"type": "json_object"}, 3),
    "frequency_penalty": (0.5, "x"), "logit_bias": ({"5": 1},),
}
URLS = ("file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "http://127.0.0.1:1/x.png",
        "https://example.org/x.png", "ftp://x/y", "data:text/html;base64,AAAA", "data:image/png,AAAA",
        "data:image/png;base64", "", "data:,",
        "data:image/svg+xml;base64,PHN2Zz4=", "data:image/png;base64,AAA", "data:image/png;base64,A B=",
        "data:image/png;base64,\u00e9\u00e9==", "data:image/png;base64,", "javascript:1", "DATA:image/png;base64,////",
        data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps"), data_url(PICTURE[:len(PICTURE) // 2]),
        data_url(PICTURE[:30]), data_url(bomb(60_000, 60_000)), data_url(bomb(8_192, 8_192)), data_url(bomb(20_000, 1)),
        data_url(bomb(0, 5)), data_url(bomb(300, 300)), data_url(PICTURE[::-1]), data_url(b"GIF89a" + bytes(40), "gif"))
PATHS = ("/", "/v1", "/v1/", "/v1/../../etc/passwd", "/v1/models/", "/%2e%2e/etc/passwd", "/v1/models%00",
         "http://localhost/v1/models", "/v1/chat/completions/..", "/\u00e9", "/" + "a" * 5000)


def cases(body_limit):
    """(name, bytes, status) of requests that each must get this status."""
    good = post(ask())
    found = []

    def case(name, raw, status):
        found.append((name, raw, status))

    for field, values in WRONG.items():
        for value in values:
            case(f"{field}={str(value)[:30]}", post(ask(**{field: value})), 400)
    for url in URLS:
        case(f"picture {url[:30]}", look_at(url), 400)
    for path in PATHS:
        case(f"GET {path[:30]}", f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 404)
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW"):
        case(method, good.replace(b"POST", method.encode(), 1), 405)
    case("GET of the chat", f"GET {PATH} HTTP/1.1\r\n\r\n".encode(), 405)
    case("POST of the models", post(ask(), path="/v1/models"), 405)
    case("another model", post(ask(model="gpt-9")), 404)
    case("a model of another type", post(ask(model=[3])), 404)
    # JSON
    deep = 50_000
    for name, body in (("no JSON", b"{"), ("empty", b""), ("a list", b"[]"), ("a number", b"3"), ("null", b"null"),
                       ("NaN", b'{"temperature": NaN}'), ("Infinity", b'{"temperature": -Infinity}'),
                       ("1e999", json.dumps(ask()).replace('"temperature": 0', '"temperature": 1e999').encode()),
                       ("long number", b'{"n": ' + b"9" * 100_000 + b"}"), ("invalid UTF-8", b'{"user": "\xff\xfe"}'),
                       ("UTF-16", json.dumps(ask()).encode("utf-16")), ("nested lists", b"[" * deep + b"]" * deep),
                       ("nested objects", b'{"a":' * deep + b"1" + b"}" * deep), ("two objects", b"{}{}"),
                       ("many objects", b"[" + b"{}," * 300_000 + b"{}]"), ("zeros", bytes(5000))):
        case(name, post(body), 400)
    case("too many pictures", look_at(*[data_url(PICTURE)] * 17), 400)
    # HTTP
    case("no length", post(ask(), Content_Length=None), 411)
    case("chunked", post(b"5\r\nhello\r\n0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked"), 411)
    case("chunked and a length", post(ask(), Transfer_Encoding="chunked"), 411)
    for length in ("-1", "+9", "1_0", "0x10", "9" * 30, "", "1.5", "\u0663"):
        case(f"length {length}", post(ask(), Content_Length=length), 400)
    case("two lengths", good.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n", 1), 400)
    case("too large", post(bytes(body_limit + 1)), 413)
    case("said to be too large", post(b"{}", Content_Length=10 ** 12), 413)
    for kind in (None, "text/plain", "multipart/form-data", "application/jsonp", "\x01", "application/json, a/b"):
        case(f"type {kind}", post(ask(), Content_Type=kind), 415)
    case("no request", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400)
    case("one word", b"HELLO\r\n\r\n", 400)
    case("HTTP/9", b"GET /health HTTP/9.9\r\n\r\n", 400)
    case("long line", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 400)
    case("long header", b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 400)
    case("many headers", b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 200 + b"\r\n", 400)
    # And what is not wrong.
    case("pipelined", good + good + b"GET /health HTTP/1.1\r\n\r\n", 200)
    case("harmless fields", post(ask(user="me", frequency_penalty=0, presence_penalty=0.0, logit_bias=None, tools=[],
                                     stream=False, logprobs=False, n=None, store=True, stop=None, whatever=[1])), 200)
    case("a picture", look_at(data_url(PICTURE)), 200)
    return found


# ---------------------------------------------------------------- sending them

def exchange(port, raw, timeout=30, cut=False):
    """Sends bytes -> (status, headers' text, body) of the first answer, status 0 for none; cut: leaves right away."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        try:
            connection.sendall(raw)
        except OSError:             # refused before all of it was read
            pass
        got = b"" if cut else receive(connection)
    head, _, body = got.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1."):
        return 0, "", got
    return int(head.split()[1]), head.decode("latin-1"), body


def receive(connection):
    got = b""
    try:
        while more := connection.recv(2 ** 16):
            got += more
    except OSError:
        pass
    return got


def is_an_answer(status, body):
    """Whether a client can read it: an answer, or an error of OpenAI's form without any of Python's own words."""
    found = json.loads(body)
    if status == 200:
        return "error" not in found
    error = found["error"]
    return (set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) < 600
            and "Traceback" not in error["message"])


def damaged(raw, rng):
    """Bytes with a few of them changed, left out or repeated."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(raw))
        kind = rng.randrange(3)
        if kind == 0:
            raw[place] = rng.randrange(256)
        elif kind == 1:
            del raw[place:place + rng.randint(1, 5)]
        else:
            raw[place:place] = raw[place:place + rng.randint(1, 50)]
        if not raw:
            break
    return bytes(raw)


def attack(port, count, body_limit, seed=0, patience=0.5):
    """Sends `count` requests -> Counter of statuses, 0 for no answer. patience: seconds that a damaged one is waited
    for. Raises AssertionError naming one that got another answer than it must."""
    rng = random.Random(seed)
    listed = cases(body_limit)
    good = [post(ask()), look_at(data_url(PICTURE)), b"GET /v1/models HTTP/1.1\r\n\r\n"]
    statuses = Counter()
    for number in range(count):
        kind = number % 4
        if kind < 2:                # in turn, so that 250 requests or so send every one
            name, raw, expected = listed[(number // 4 * 2 + kind) % len(listed)]
            status, _, body = exchange(port, raw)
            assert status == expected, f"{name}: {status} in the place of {expected}: {body[:300]}"
        elif kind == 2:
            name = "damaged"
            # A length that was made larger waits for bytes that never come.
            status, _, body = exchange(port, damaged(rng.choice(good), rng), patience)
        else:
            name = "cut"
            raw = rng.choice(good)
            status, _, body = exchange(port, raw[:rng.randrange(1, len(raw))], cut=True)
        assert not status or is_an_answer(status, body), f"{name}: {body[:300]}"
        statuses[status] += 1
    return statuses


if __name__ == "__main__":
    began = time.perf_counter()
    print(dict(attack(int(sys.argv[1]), int(sys.argv[2]), 2 ** 25)), f"in {time.perf_counter() - began:.1f} s")
