"""The body of a /v1/chat/completions request -> Request, or one sentence about what is wrong with it (Refused).

    request = read_request(body, "embedded-1/rl", see, Limits())

Of OpenAI's fields this reads messages, n, temperature, top_p, max_tokens, max_completion_tokens, stop, seed and model.
A field that would change the answer in a way that this server cannot is refused; any other one is ignored.
"""
import base64
import io
import json
import math
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.chat import IMAGE, as_words
from data.sample import Sample, read_image


@dataclass(frozen=True)
class Limits:
    """What a server takes on, so that no client uses up its memory or its threads."""
    body: int = 2 ** 25             # bytes of a request's body
    bodies: int = 2 ** 27           # bytes of all bodies that are being received or read
    structure: int = 100_000        # commas and brackets of a body: each may become an object, many times its size
    text: int = 2 ** 18             # characters of all messages of a request
    pictures: int = 16              # of a request
    pixels: int = 2 ** 25           # of a picture
    side: int = 2 ** 13             # of a picture, its longest in pixels: a tower may look at the square around it
    choices: int = 64               # n
    stops: int = 4
    room: int = 2 ** 15             # tokens of prompt and answer, where the model has no window of its own
    sampled: int = 2 ** 16          # tokens that all answers to a request may have together
    seconds: float = 30.0           # for a request to arrive, and for its answer to be taken
    connections: int = 64           # open at once
    waiting: int = 32               # requests that wait for the model


class Refused(Exception):
    """What a client gets instead of an answer. status: of HTTP; param: the field that it is about; code: OpenAI's short
    name, both None where there is none."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


@dataclass(frozen=True)
class Request:
    """What a client asks for. system: None for the template's own text; max_tokens: None for as many as the model
    usually has; seed: None for another one each time."""
    sample: Sample
    system: str | None
    n: int
    temperature: float
    top_p: float
    max_tokens: int | None
    stop: tuple
    seed: int | None


# Fields that change an answer, with the values that leave it as it is.
WITHOUT_EFFECT = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "stream": (False,), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")     # Pillow knows others that start programs
PICTURE_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64")


def read_request(body, model, see, limits):
    """Bytes of JSON -> Request. model: the name of the only one there is; see: bytes of a picture -> what Sample.images
    holds, ValueError for no picture. Raises Refused."""
    fields = read_json(body, limits)
    name = fields.get("model")
    if name is not None and name != model:
        raise Refused(404, f"model must be {model!r}, the only one here, not {_shown(name)}", "model",
                      "model_not_found")
    if fields.get("stream") not in (None, False):
        raise Refused(400, "stream must be false: this server sends an answer as a whole", "stream")
    for field, values in WITHOUT_EFFECT.items():
        value = fields.get(field)
        if value is not None and value not in values:
            raise Refused(400, f"{field}={_shown(value)} cannot be served; leave the field out", field)
    # A temperature and top_p left out are 1, as OpenAI has them.
    options = dict(
        n=_whole(fields, "n", 1, 1, limits.choices),
        temperature=_real(fields, "temperature", 1.0, "[0, 2]"),
        top_p=_real(fields, "top_p", 1.0, "(0, 1]"),
        max_tokens=_max_tokens(fields),
        stop=_stop(fields, limits.stops),
        seed=_whole(fields, "seed", None, -2 ** 63, 2 ** 63 - 1))
    sample, system = read_messages(fields.get("messages"), see, limits)
    return Request(sample=sample, system=system, **options)


def read_json(body, limits):
    """Bytes -> the object that they spell. Raises Refused."""
    structure = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if structure > limits.structure:
        raise Refused(400, f"the body has {structure} commas and brackets; expected at most {limits.structure}")
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_no_number, parse_int=_short_int)
    except RecursionError:
        raise Refused(400, "the body's JSON is nested too deeply") from None
    except ValueError as error:         # UnicodeDecodeError and JSONDecodeError are ones
        raise Refused(400, f"the body is no JSON in UTF-8: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise Refused(400, f"the body must be a JSON object, not {_shown(fields)}")
    return fields


def _no_number(word):
    raise ValueError(f"{word} is no number of JSON")


def _short_int(digits):
    if len(digits) > 20:                # older Pythons read long ones in quadratic time
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _shown(value):
    """A value as an error names it, however long it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str) and len(value) > 60:
        return repr(value[:60]) + ".."
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


# ---------------------------------------------------------------- numbers and stops

def _whole(fields, name, default, least, most):
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise Refused(400, f"{name}={_shown(value)} must be a whole number from {least} to {most}", name)
    return value


def _real(fields, name, default, interval):
    """interval: "[0, 2]" or "(0, 1]"."""
    value = fields.get(name)
    if value is None:
        return default
    least, most = (float(bound) for bound in interval[1:-1].split(","))
    is_number = type(value) in (int, float) and math.isfinite(value) and least <= value <= most
    if not is_number or (interval[0] == "(" and value == least):
        raise Refused(400, f"{name}={_shown(value)} must be a number in {interval}", name)
    return float(value)


def _max_tokens(fields):
    """max_completion_tokens, or its older name max_tokens; whether they fit is seen once the prompt is known."""
    older = _whole(fields, "max_tokens", None, 1, 2 ** 31)
    return _whole(fields, "max_completion_tokens", older, 1, 2 ** 31)


def _stop(fields, most):
    value = fields.get("stop")
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    is_texts = isinstance(texts, list) and all(isinstance(text, str) and 0 < len(text) <= 256 for text in texts)
    if not is_texts or len(texts) > most:
        raise Refused(400, f"stop={_shown(value)} must be a text of 1 to 256 characters, or a list of at most {most}",
                      "stop")
    for text in texts:
        _check_unicode(text, "stop")
    return tuple(texts)


# ---------------------------------------------------------------- messages

def read_messages(messages, see, limits):
    """A list of messages -> (Sample, system text or None): pictures stand in front of the text of their message, in
    order. Raises Refused."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, f"messages={_shown(messages)} must be a list of at least one message", "messages")
    system = None
    said = []               # (text, URLs of pictures) of user, assistant, user, ..
    characters = 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise Refused(400, f"{where} must be an object with role and content, not {_shown(message)}", where)
        role = message.get("role")
        text, urls = _content(message.get("content"), f"{where}.content")
        characters += len(text)
        if urls and role != "user":
            raise Refused(400, f"{where} must hold no picture: only the user's messages may", where)
        if number == 0 and role in ("system", "developer"):
            system = text
            continue
        expected = "assistant" if len(said) % 2 else "user"
        if role != expected:
            raise Refused(400, f"{where}.role={_shown(role)} must be {expected!r}: after at most one system message "
                          "user and assistant take turns", f"{where}.role")
        said.append((text, urls))
    if len(said) % 2 == 0:
        raise Refused(400, "the last of messages must be the user's", "messages")
    if characters > limits.text:
        raise Refused(400, f"messages hold {characters} characters; expected at most {limits.text}", "messages")
    return _sample(said, see, limits), system


def _content(content, where):
    """-> (text, URLs of pictures)."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Refused(400, f"{where}={_shown(content)} must be a text or a list of parts", where)
    texts = []
    urls = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            urls.append(_url(part["image_url"] if "image_url" in part else None, where))
        else:
            raise Refused(400, f'{where} must hold parts {{"type": "text", "text": ..}} and {{"type": "image_url", '
                          f'"image_url": {{"url": ..}}}} only', where)
    text = "".join(texts)               # as the templates in data/jinja.py join them
    _check_unicode(text, where)
    # The placeholder of a picture, spelt by a client, is text. The space parts it whatever stands around it.
    return as_words(text), urls


def _check_unicode(text, where):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(400, f"{where} must be text, and holds half a character (a lone surrogate)", where) from None


def _url(image, where):
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise Refused(400, f"{where} has an image_url without a url", where)
    head, comma, _ = url[:100].partition(",")
    if not comma or not PICTURE_URL.fullmatch(head.lower()):
        raise Refused(400, f"{where} has the picture {_shown(url)}; expected data:image/..;base64,..: nothing is "
                      "fetched or opened here", where)
    return url


def _sample(said, see, limits):
    """Texts with the URLs of their pictures, the user's and the assistant's in turns -> Sample."""
    urls = [url for _, urls in said for url in urls]
    if len(urls) > limits.pictures:
        raise Refused(400, f"messages hold {len(urls)} pictures; expected at most {limits.pictures}", "messages")
    texts = []
    in_front = len(urls) == len(said[0][1])     # where data.chat puts them by itself
    for text, pictures in said:
        if pictures and not in_front:
            text = "\n".join([IMAGE] * len(pictures) + [text])
        texts.append(text)
    images = []
    for number, url in enumerate(urls):
        try:
            images.append(see(base64.b64decode(url.partition(",")[2], validate=True)))
        except ValueError as error:             # binascii.Error is one
            raise Refused(400, f"picture {number} of messages cannot be used: {str(error)[:200]}", "messages") from None
    turns = tuple(zip(texts[0:-1:2], texts[1::2]))
    return Sample(images=tuple(images), turns=turns, question=texts[-1])


def decode_picture(data, limits):
    """Bytes of a PNG, JPEG, WebP, GIF or BMP -> (H, W, 3) uint8; ValueError for anything else, and for too many pixels,
    which the file's header tells before they are decoded."""
    expected = f"expected {', '.join(FORMATS)} of at most {limits.pixels} pixels and sides of at most {limits.side}"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise ValueError(f"it has far too many pixels; {expected}") from None
    except Exception:       # on odd bytes Pillow's readers raise OSError, SyntaxError, struct.error and more
        raise ValueError(f"its {len(data)} bytes are no picture; {expected}") from None
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise ValueError(f"it has {width} x {height} pixels; {expected}")
    return np.asarray(read_image(data))
