"""Questions about pictures of one's own, one JSON object a line:

    {"image": "pictures/cat.jpg", "question": "What colour is the cat?", "answer": "black", "reasoning": "..."}

`image` is relative to the file. Optional: reasoning, caption (else the answer), aliases, choices (the answer is one of
them, or its letter), tolerance and unit of a number, boxes ([[x1, y1, x2, y2], ..], for the reward iou), id, and split
("train" or "val"; else the hash of the pixels decides, so that all lines about one picture fall together).

    splits, report_line = load("mine.jsonl")       # splits["train"], splits["val"]: lists of Sample
"""
import codecs
import json
import math
import os
from collections import Counter
from string import ascii_lowercase

from data.answers import TAG, alike, fault, key, verdict
from data.sample import Sample
from data.splits import pixel_hash, split_of

REQUIRED = ("image", "question", "answer")
FIELDS = REQUIRED + ("reasoning", "caption", "aliases", "choices", "tolerance", "unit", "boxes", "id", "split")
# Characters of a field: some 5,000 tokens of English, more than LLaVA-1.5 can read. Attention takes the square of it,
# and `tokenizer.train` passes over texts of more than 100,000 bytes.
LONGEST = 20_000


class RepeatedKey(ValueError):
    """A JSON object says one thing twice."""


def no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def unique(pairs):
    """The (key, value) pairs of a JSON object -> dict; json's own keeps the last of two values without a word."""
    record = dict(pairs)
    if len(record) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise RepeatedKey(f"the key {counts.most_common(1)[0][0]!r} stands more than once in one object")
    return record


def text(record, field, numbers=False):
    value = record.get(field, "")
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a string{' or a number' * numbers}, not {type(value).__name__}")
    if len(value) > LONGEST:
        raise ValueError(f"field {field!r} has {len(value)} characters and must have at most {LONGEST}")
    return value if field == "image" else value.strip()         # a file name may begin with a space


def texts(record, field):
    value = record.get(field, [])
    if not isinstance(value, list):
        raise ValueError(f"field {field!r} must be a list of strings, not {type(value).__name__}")
    return tuple(text({f"{field}[{i}]": item}, f"{field}[{i}]", numbers=True) for i, item in enumerate(value))


def finite(value, field):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"field {field!r} must be a finite number, not {value!r}")
    return float(value)


def boxes(record):
    found = record.get("boxes", [])
    if not isinstance(found, list) or not all(isinstance(box, list) and len(box) == 4 for box in found):
        raise ValueError("field 'boxes' must be a list of [x1, y1, x2, y2]")
    found = tuple(tuple(finite(value, "boxes") for value in box) for box in found)
    if not all(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in found):
        raise ValueError("field 'boxes' must hold boxes [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    return found


def parse(line, folder, name):
    """One line (bytes) -> (Sample, unknown fields); ValueError says what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=unique)
        json.dumps(record, ensure_ascii=False).encode()         # "\ud800" is JSON but no text a tokenizer takes
    except RepeatedKey:
        raise
    except UnicodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object with {', '.join(REQUIRED)}, not {type(record).__name__}")
    record = {field: value for field, value in record.items() if value is not None}     # null is absent
    for field in REQUIRED:
        if field not in record:
            raise ValueError(f"field {field!r} is missing")
        if not text(record, field, numbers=field == "answer").strip():
            raise ValueError(f"field {field!r} is empty; expected some text")
    answer, reasoning, split = text(record, "answer", numbers=True), text(record, "reasoning"), text(record, "split")
    if split not in ("", "train", "val"):
        raise ValueError(f"field 'split' must be \"train\" or \"val\", not {split!r}")
    sample = Sample(
        id=text(record, "id", numbers=True) or name, images=(os.path.join(folder, record["image"]),),
        question=text(record, "question"), answer=answer, caption=text(record, "caption") or answer,
        reasoning=reasoning, conclusion=answer if reasoning else "", aliases=texts(record, "aliases"),
        choices=texts(record, "choices"), tolerance=finite(record.get("tolerance", 0), "tolerance"),
        unit=text(record, "unit"), boxes=boxes(record), split=split, source="jsonl")
    if sample.tolerance < 0:
        raise ValueError(f"field 'tolerance' must not be negative, it is {sample.tolerance:g}")
    for field in ("question", "answer", "reasoning", "caption", "aliases", "choices"):
        tag = TAG.search(str(getattr(sample, field)))
        if tag:
            raise ValueError(f"field {field!r} holds the tag {tag.group()}, which the prompt template sets itself")
    check_answers(sample)
    return sample, set(record) - set(FIELDS)


def check_answers(sample):
    """Raises ValueError unless the answer can be given, and is right where other choices are wrong."""
    for gold in (sample.answer, *sample.aliases):
        why = fault(gold)
        if why:
            raise ValueError(f"the answer {gold!r} can never be right: it {why}")
    if not sample.choices:
        return
    answer, letters = sample.answer, ascii_lowercase[:len(sample.choices)]
    written = {answer, *sample.aliases} & set(sample.choices)
    if not written and (len(answer) != 1 or answer.lower() not in letters):
        raise ValueError(f"the answer {answer!r} is not among the choices {list(sample.choices)}")
    for same in alike(sample.choices, sample.unit):
        raise ValueError(f"the choices {' and '.join(map(repr, same))} count as the same answer")
    golds = {key(gold, sample.unit) for gold in (answer, *sample.aliases)}
    meant = {choice for choice in sample.choices if key(choice, sample.unit) in golds}
    if not meant:
        meant = {sample.choices[letters.index(answer.lower())]}
    for choice in sample.choices:
        right, why = verdict(sample, choice)
        if right and choice not in meant:
            raise ValueError(f"the choice {choice!r} counts as right beside the answer {answer!r}: it is {why}")


def load(path, val_percent=20):
    """The lines of `path` -> ({"train": [Sample], "val": [Sample]}, a line that says what was found)."""
    where = f"jsonl file {str(path)!r}"
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise ValueError(f"{where} {'is a folder' if os.path.isdir(path) else 'does not exist'}; "
                         "expected a file of JSON objects, one a line")
    splits, keys, first, unknown = {"train": [], "val": []}, {}, {}, set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                sample, extra = parse(line, os.path.dirname(path), f"{os.path.basename(path)}:{number}")
                image = sample.images[0]
                if image not in keys:               # many lines ask about one picture: decode it once
                    keys[image] = pixel_hash(image)
            except ValueError as error:
                raise ValueError(f"{where}, line {number}: {error}") from None
            split = sample.split or split_of(keys[image], val_percent)
            earlier, earlier_number = first.setdefault(keys[image], (split, number))
            if split != earlier:
                raise ValueError(f"{where}: lines {earlier_number} and {number} show the same picture but fall in "
                                 f"{earlier} and {split}; give both the same split")
            splits[split].append(Sample(**{**vars(sample), "split": split}))
            unknown |= extra
    train, val = splits["train"], splits["val"]
    if not train + val:
        raise ValueError(f"{where} is empty; expected JSON objects with {', '.join(REQUIRED)}, one a line")
    for split, lines in splits.items():
        if not lines:
            raise ValueError(f"{where}: no line falls in {split} (of {len(train + val)} lines about {len(first)} "
                             'pictures); add pictures, or give lines a "split"')
    report = f"jsonl: {len(train + val)} lines about {len(first)} pictures; {len(train)} train, {len(val)} val"
    reasoned = sum(bool(sample.reasoning) for sample in train + val)
    report += f"; {reasoned} with reasoning" if reasoned else ""
    return splits, report + (f"; unknown fields passed over: {', '.join(sorted(unknown))}" if unknown else "")
