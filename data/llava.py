"""LLaVA's instruction files: conversations about pictures, as one JSON list or as one object after
another.

    [{"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt",
      "value": "A bus."}]}, ..]

`image` is relative to an image folder; it may be absent, or a list with one <image> in the texts
for each.

    records, bad = Records("llava_v1_5_mix665k.json", "pictures"), Bad("skip")
    try:
        sample = records[7]                                 # parsed only now
        pictures = records.arrays(sample, 336, fit="pad")   # decoded only now
    except BadRecord as error:
        bad.see(error)
"""
import json
import mmap
import os
from collections import defaultdict
from dataclasses import replace
from itertools import dropwhile

import numpy as np

from data.chat import IMAGE
from data.jsonl import unique
from data.sample import CLIP_MEAN, FITS, Sample, to_array
from data.spans import EXPECTED, spans

# What can be wrong with a record.
KINDS = ("not valid JSON", "no conversation", "no answer", "image token in an answer", "missing image",
         "unreadable image", "images and <image> tokens differ", "too long", "no pair")


class BadRecord(ValueError):
    """A record that cannot be trained on. kind: one of KINDS; number: its index in the file; name:
    its id."""

    def __init__(self, kind, number, name, reason):
        super().__init__(f"record {number} (id {name!r}): {kind}: {reason}")
        self.kind = kind
        self.number = number
        self.name = name


class Bad:
    """The tally of bad records. policy: "skip" counts them, "stop" raises the first; anything else
    is a ValueError."""

    def __init__(self, policy):
        if policy not in ("skip", "stop"):
            raise ValueError(f"bad-records policy {policy!r} must be 'skip' or 'stop'")
        self.policy = policy
        self.seen = {}              # number -> (kind, name): every epoch meets a bad record again

    def see(self, error):
        """Counts a record. -> whether it was not known to be bad. Under "stop" raises `error`."""
        if self.policy == "stop":
            raise error
        new = error.number not in self.seen
        self.seen.setdefault(error.number, (error.kind, error.name))
        return new

    def note(self, line):
        """Takes down a record that a log's line, or another rank, says is bad."""
        self.seen[line["number"]] = line["kind"], line["name"]

    def report(self):
        """One line, the commonest kind first, at most five names of each; "" when none was seen.

        >>> bad = Bad("skip")
        >>> [bad.see(BadRecord("missing image", n, name, "no a.jpg")) for n, name in enumerate(("id7", "id9"))]
        [True, True]
        >>> bad.report()
        '2 bad records skipped: 2 missing image (id7, id9)'
        """
        if not self.seen:
            return ""
        names = defaultdict(list)
        for kind, name in self.seen.values():
            names[kind].append(name)
        entries = []
        for kind, found in sorted(names.items(), key=lambda item: -len(item[1])):
            shown = found[:5] if len(found) <= 5 else [*found[:5], "..."]
            entries.append(f"{len(found)} {kind} ({', '.join(shown)})")
        plural = "" if len(self.seen) == 1 else "s"
        return f"{len(self.seen)} bad record{plural} skipped: {', '.join(entries)}"


class Records:
    """The records of the file `path` as a list of Sample, image paths joined to `image_root`.

    Construction finds where each record begins and ends (`start`, `stop`: (n,) int64 arrays of byte
    offsets) and parses none. Raises ValueError for an image folder or a file that is missing, and
    for a file that is a folder, empty, cut short, or neither a JSON list of objects nor objects one
    after the other.
    """

    def __init__(self, path, image_root):
        self.path = os.path.expanduser(path)
        self.image_root = os.path.expanduser(image_root)
        where = f"llava file {str(path)!r}"
        if not os.path.isfile(self.path):
            problem = "is a folder" if os.path.isdir(self.path) else "does not exist"
            raise ValueError(f"{where} {problem}; {EXPECTED}")
        if not os.path.isdir(self.image_root or "."):
            raise ValueError(f"image folder {str(image_root)!r} does not exist; expected the "
                             f"folder from which the image paths in {where} start")
        try:
            with open(self.path, "rb") as file:
                self.start, self.stop = spans(file)
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None

    def __len__(self):
        return len(self.start)

    def __getitem__(self, i):
        """Record i, counted from 0 (from the end, if negative) -> Sample. Raises BadRecord, or
        IndexError."""
        number = int(i)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        content = self.bytes[self.start[number]:self.stop[number]]
        return sample_of(content, number, self.image_root)

    def arrays(self, sample, size, fit="crop", mean=CLIP_MEAN):
        """The pictures of one of these samples -> tuple of (size, size, 3) uint8 arrays, fitted as
        `to_array` does. Raises BadRecord for a picture that cannot be decoded."""
        try:
            return tuple(to_array(path, size, fit, mean) for path in sample.images)
        except ValueError as error:
            if fit not in FITS:                     # the caller's mistake, no fault of the record
                raise
            raise BadRecord("unreadable image", sample.number, sample.id, error) from None

    def decoded(self, sample, pixels):
        """One of these samples with its pictures decoded; pixels: arguments of `collate`. Raises
        BadRecord."""
        arrays = self.arrays(sample, pixels["image_size"], pixels["fit"], pixels["mean"])
        return replace(sample, images=arrays)

    def first(self, count):
        """The usable samples among the first `count` records."""
        for i in range(min(count, len(self))):
            try:
                yield self[i]
            except BadRecord:
                pass

    def pairs(self, captions=False):
        """The records as a list of (sample, what is learned from it): the last answer, and with it
        all others; captions: None instead, for the caption alone."""
        return Pairs(self, captions)

    def lengths(self, image_tokens):
        """(n,) int64: about how many tokens each record has, to batch like with like; nothing is
        parsed.

        Four bytes a token, about what English has, and `image_tokens` for each <image>.
        """
        pictures = np.zeros(len(self), dtype=np.int64)
        # 1024 records at a time: read through the map, the whole file would stay in memory.
        with open(self.path, "rb") as file:
            for first in range(0, len(self), 1024):
                chunk = slice(first, first + 1024)
                offset = self.start[first]
                start = (self.start[chunk] - offset).tolist()
                stop = (self.stop[chunk] - offset).tolist()
                file.seek(offset)
                text = file.read(stop[-1])
                pictures[chunk] = [text.count(IMAGE.encode(), a, b) for a, b in zip(start, stop)]
        return (self.stop - self.start) // 4 + image_tokens * pictures


class Pairs:
    """What `Records.pairs` gives; parsed at access, as the records are."""

    def __init__(self, records, captions):
        self.records = records
        self.captions = captions

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        sample = self.records[i]
        target = None if self.captions else sample.answer
        return sample, target


def shortened(row, limit, image_tokens, image_id, number, name):
    """(ids, target mask, images) -> the same, cut after `limit` tokens, as LLaVA cuts what its
    context cannot hold.

    Raises BadRecord when the cut goes through or before a picture, or leaves nothing to predict.
    """
    ids, mask, images = row
    if ids[:limit].count(image_id) != image_tokens * len(images):
        raise BadRecord("too long", number, name, f"a picture lies beyond its first {limit} tokens")
    if not any(mask[:limit]):
        raise BadRecord("too long", number, name, f"no answer lies in its first {limit} tokens")
    return ids[:limit], mask[:limit], images


# ---------------------------------------------------------------- parsing one record

def sample_of(content, number, image_root):
    """The bytes of record `number` -> Sample; BadRecord says why not.

    A conversation is questions and answers in alternation, as LLaVA's preprocess_v1 wants it: what
    gpt says before the first question is dropped. So is a last question without an answer, which
    teaches nothing, unless it is the only one.
    """
    name = str(number)
    record = _object(content, number, name)
    if isinstance(record.get("id"), (str, int)) and record["id"] != "":
        name = str(record["id"])
    humans, answers = conversation(record, number, name)
    paths = tuple(os.path.join(image_root, file) for file in image_names(record, number, name))
    for path in paths:
        if not os.path.exists(path):
            raise BadRecord("missing image", number, name, f"{path!r} does not exist")
    if not any(IMAGE in human for human in humans):
        # LLaVA's own files always say where the picture stands; others leave it to the reader:
        # before everything.
        humans[0] = IMAGE * len(paths) + humans[0]
    questions = [images_first(human) for human in humans[:len(answers)]]
    placed = sum(question.count(IMAGE) for question in questions)
    if placed != len(paths):
        raise BadRecord("images and <image> tokens differ", number, name,
                        f"{len(paths)} images, {placed} times <image> in the questions that have an answer")
    return Sample(
        id=name,
        images=paths,
        turns=tuple(zip(questions[:-1], answers[:-1])),
        question=questions[-1],
        answer=answers[-1],
        caption=answers[0],
        split="train",
        source="llava",
        number=number)


def _object(content, number, name):
    """The bytes of a record -> its JSON object as a dict; BadRecord for anything else."""
    try:
        record = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
        # "\ud800" is JSON but no text that a tokenizer takes.
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise BadRecord("not valid JSON", number, name, f"not UTF-8 text ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("not valid JSON", number, name, error) from None
    return record


def conversation(record, number, name):
    """A record -> (human texts, gpt texts), in alternation from the first human's; the last human
    text may lack an answer. Raises BadRecord for anything else."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        raise BadRecord("no conversation", number, name, "field 'conversations' must be a list of "
                        "{'from': 'human' or 'gpt', 'value': text}")
    turns = list(dropwhile(lambda turn: turn["from"] == "gpt", turns))
    if not turns:
        raise BadRecord("no conversation", number, name, "field 'conversations' holds no turn from 'human'")
    for place, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[place % 2]:
            raise BadRecord("no conversation", number, name,
                            "turns must be from 'human' and 'gpt' in alternation")
    humans = [turn["value"] for turn in turns[0::2]]
    answers = [turn["value"] for turn in turns[1::2]]
    if not answers:
        raise BadRecord("no answer", number, name, "no question has an answer")
    if not all(answer.strip() for answer in answers):
        raise BadRecord("no answer", number, name, "an answer is empty")
    if any(IMAGE in answer for answer in answers):
        raise BadRecord("image token in an answer", number, name,
                        "<image> may stand in the human's turns only")
    return humans, answers


def _is_turn(turn):
    if not isinstance(turn, dict):
        return False
    return turn.get("from") in ("human", "gpt") and isinstance(turn.get("value"), str)


def image_names(record, number, name):
    """The record's file names, as many as it has; null is absent."""
    names = record.get("image")
    if names is None:
        return []
    if not isinstance(names, list):
        names = [names]
    if not all(isinstance(file, str) and file for file in names):
        raise BadRecord("missing image", number, name, "field 'image' must be a file name or a "
                        f"list of file names, not {record['image']!r}")
    return names


def images_first(human):
    """LLaVA's preprocess_multimodal: pictures to the front of their turn, each on a line of its
    own; turns without a picture stay as they are.

    >>> images_first("What is this? <image>"), images_first(" Why?")
    ('<image>\\nWhat is this?', ' Why?')
    """
    count = human.count(IMAGE)
    if not count:
        return human
    text = human.replace(IMAGE, "").strip()
    return ((IMAGE + "\n") * count + text).strip()
