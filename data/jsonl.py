"""Questions about pictures of one's own, one JSON object a line:

    {"image": "pictures/cat.jpg", "question": "What colour is the cat?", "answer": "black",
    "reasoning": "..."}

`image` is relative to the file. Optional: reasoning, summary (a plan, for --cot-format=llava_cot),
caption (else the answer), aliases, choices (the answer is one of them, or its letter), tolerance and
unit of a number, boxes ([[x1, y1, x2, y2], ..], for the reward iou), id, and split: "train", "val",
or the name of a split that is only evaluated, such as "hospital_b". Without a split the hash of the
pixels decides between train and val, so that all lines about one picture fall together.

    splits, report_line = load("mine.jsonl")       # splits["train"], splits["val"]: lists of Sample
"""
import codecs
import json
import math
import os
from collections import Counter

from data.answers import check_sample
from data.sample import Sample
from data.splits import Division

REQUIRED = ("image", "question", "answer")
FIELDS = REQUIRED + ("reasoning", "summary", "caption", "aliases", "choices", "tolerance", "unit", "boxes",
                     "id", "split")
# Characters of a field: some 5,000 tokens of English, more than LLaVA-1.5 can read. Attention takes
# the square of it, and `tokenizer.train` leaves out texts of more than 100,000 bytes.
LONGEST = 20_000


class RepeatedKey(ValueError):
    """A JSON object has one key twice."""


def no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def unique(pairs):
    """The (key, value) pairs of a JSON object -> dict. Raises RepeatedKey where json itself would
    silently keep the last of two values."""
    record = dict(pairs)
    if len(record) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = counts.most_common(1)[0][0]
        raise RepeatedKey(f"the key {repeated!r} stands more than once in one object")
    return record


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# One reader for each kind of field. Each raises ValueError with the field's name.

def text(record, field, numbers=False):
    """The field as a string, "" without it; numbers: a number is accepted, too."""
    value = record.get(field, "")
    if numbers and is_number(value):
        return str(value)
    if not isinstance(value, str):
        expected = "a string or a number" if numbers else "a string"
        raise ValueError(f"field {field!r} must be {expected}, not {type(value).__name__}")
    if len(value) > LONGEST:
        raise ValueError(f"field {field!r} has {len(value)} characters and must have at most {LONGEST}")
    if field == "image":                # a file name may begin with a space
        return value
    return value.strip()


def texts(record, field):
    """The field, a list of strings or numbers, as a tuple of strings."""
    values = record.get(field, [])
    if not isinstance(values, list):
        raise ValueError(f"field {field!r} must be a list of strings, not {type(values).__name__}")
    found = []
    for i, value in enumerate(values):
        name = f"{field}[{i}]"
        found.append(text({name: value}, name, numbers=True))
    return tuple(found)


def finite(value, field):
    """A finite number -> float."""
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(f"field {field!r} must be a finite number, not {value!r}")
    return float(value)


def boxes(record):
    """The field "boxes" as a tuple of (x1, y1, x2, y2)."""
    values = record.get("boxes", [])
    if not isinstance(values, list):
        raise ValueError("field 'boxes' must be a list of [x1, y1, x2, y2]")
    found = []
    for box in values:
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError("field 'boxes' must be a list of [x1, y1, x2, y2]")
        x1, y1, x2, y2 = (finite(value, "boxes") for value in box)
        if x1 >= x2 or y1 >= y2:
            raise ValueError("field 'boxes' must hold boxes [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
        found.append((x1, y1, x2, y2))
    return tuple(found)


def object_of(line):
    """A line (bytes) -> its JSON object as a dict without null fields; ValueError for anything
    else."""
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=unique)
        # "\ud800" is JSON but no text that a tokenizer takes.
        json.dumps(record, ensure_ascii=False).encode()
    except RepeatedKey:
        raise
    except UnicodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object with {', '.join(REQUIRED)}, not {type(record).__name__}")
    return {field: value for field, value in record.items() if value is not None}   # null is absent


def parse(line, folder, name):
    """One line (bytes) -> (Sample, unknown fields); folder: where image paths start; name: the id
    of a line without one. ValueError says what is wrong with the line."""
    record = object_of(line)
    for field in REQUIRED:
        if field not in record:
            raise ValueError(f"field {field!r} is missing")
        if not text(record, field, numbers=field == "answer").strip():
            raise ValueError(f"field {field!r} is empty; expected some text")
    answer = text(record, "answer", numbers=True)
    reasoning = text(record, "reasoning")
    sample = Sample(
        id=text(record, "id", numbers=True) or name,
        images=(os.path.join(folder, record["image"]),),
        question=text(record, "question"),
        answer=answer,
        caption=text(record, "caption") or answer,
        summary=text(record, "summary"),
        reasoning=reasoning,
        conclusion=answer if reasoning else "",
        aliases=texts(record, "aliases"),
        choices=texts(record, "choices"),
        tolerance=finite(record.get("tolerance", 0), "tolerance"),
        unit=text(record, "unit"),
        boxes=boxes(record),
        split=text(record, "split"),
        source="jsonl")
    if sample.tolerance < 0:
        raise ValueError(f"field 'tolerance' must not be negative, it is {sample.tolerance:g}")
    check_sample(sample)
    return sample, set(record) - set(FIELDS)


def load(path, val_percent=20):
    """The lines of `path` -> ({"train": [Sample], "val": [Sample], and every other split that a
    line names}, a line that reports what was found)."""
    where = f"jsonl file {str(path)!r}"
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        problem = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"{where} {problem}; expected a file of JSON objects, one a line")
    folder, file_name = os.path.split(path)
    division = Division(val_percent)
    unknown = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                sample, unknown_fields = parse(line, folder, f"{file_name}:{number}")
                division.put(sample, f"line {number}")
            except ValueError as error:
                raise ValueError(f"{where}, line {number}: {error}") from None
            unknown |= unknown_fields
    if not division.count:
        raise ValueError(f"{where} is empty; expected JSON objects with {', '.join(REQUIRED)}, one a line")
    try:
        division.check("line")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    report = [f"jsonl: {division.count} lines about {len(division.first)} pictures", division.counts()]
    reasoned = sum(bool(sample.reasoning) for samples in division.splits.values() for sample in samples)
    if reasoned:
        report.append(f"{reasoned} with reasoning")
    if unknown:
        report.append(f"unknown fields ignored: {', '.join(sorted(unknown))}")
    return division.splits, "; ".join(report)
