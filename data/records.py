"""Records of a teacher's chains of thought: what one holds, what makes it unfit to learn from, and
the file of them.

    sections, reason = check_reply(reply, sample, "stop", saw_gold=False)       # reason "" is kept
    with RecordFile("mine.jsonl") as file:              # for this process alone; adds to it
        file.put(record)                                # one line, on the disk when `put` returns
    splits, found = load("mine.jsonl")                  # --data=records:mine.jsonl
    export_llava("mine.jsonl", "llava_cot.json")        # as LLaVA-CoT published its own

The file holds every reply, the dropped ones with their reason, so that a run that goes on asks
nothing twice.
"""
import hashlib
import io
import json
import os
import re
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from data import chat
from data.answers import TAG, is_right
from data.chat import ALL_TAGS, SECTIONS, staged_text
from data.sample import Sample, read_image
from data.splits import divide

try:
    import fcntl
except ImportError:         # Windows has none; two processes on one file are then up to the user
    fcntl = None

# A chain that speaks of an answer or a hint that it was handed. Students of LLaVA-CoT's data
# learned such sentences from it. Choices, options and the answer that the chain itself arrives at
# are no leak, nor is a hint of blue, or what hints at something.
_HANDED = (r"(?:given|provided|supplied|standard|reference|gold(?:en)?|ground[- ]truth|official"
           r"|expected|stated)")
_LEAK = re.compile(
    rf"\b{_HANDED}\s+(?:final\s+|correct\s+|right\s+)?(?:answers?|solutions?|labels?|responses?)\b"
    r"(?!\s+(?:choice|option)s?\b)"
    r"|\b(?:answer|solution)\s+(?:that\s+)?(?:is|was|has\s+been|I\s+was|we\s+were)"
    r"\s+(?:given|provided|supplied)\b"
    r"|\bground[- ]truth\b"
    r"|\bhints?\b(?!\s+(?:of|at)\b)", re.IGNORECASE)


def is_leak(text):
    """Whether a chain speaks of an answer that it was given, or of a hint.

    >>> is_leak("This agrees with the standard answer.")
    True
    >>> is_leak("Of the given answer choices, B fits.")
    False
    """
    return _LEAK.search(text) is not None


# ---------------------------------------------------------------- what is kept, and why not

# Why a reply is dropped, in the order in which it is checked.
REASONS = {
    "failed": "the endpoint did not answer",
    "refused": "the model, or the endpoint, declined",
    "cut_off": "finish_reason length or content_filter",
    "empty": "no text at all",
    "malformed": "not all four sections, closed and not empty",
    "wrong": "the conclusion is not the gold answer",
    "leaked": "summary, caption or reasoning speaks of an answer that was given",
}
HELD_OUT = "held_out"       # a question of another split than train: for evaluation, never asked
CUT = ("length", "content_filter")
_REFUSAL = re.compile(
    r"\s*(?:sorry,|(?:I'm|I am) (?:very |really |so )?sorry\b|(?:I'm|I am) (?:not able|unable) to\b"
    r"|I (?:cannot|can't|can not|won't|will not)"
    r" (?:help|assist|answer|comply|identify|provide|do|fulfil)\b)",
    re.IGNORECASE)


def check_reply(reply, sample, finish_reason="stop", saw_gold=False):
    """A teacher's reply -> ({section: text} of what it holds, the reason to drop it, "" for none).

    reply: a text with the four tags, or {section: reply} of a teacher that is asked stage by stage.
    finish_reason: as an endpoint gives it; "refusal" and "failed" beside that. saw_gold: whether
    the teacher was told the answer. One that was not may speak of a hint where the question does
    so itself.
    """
    sections, verdicts = judge(reply, sample, finish_reason, saw_gold)
    return sections, first_reason(verdicts)


def judge(reply, sample, finish_reason="stop", saw_gold=False):
    """As `check_reply`, with {reason: whether it holds} of all reasons in place of the first."""
    texts = list(reply.values()) if isinstance(reply, dict) else [reply]
    sections = _sections_of(reply)
    told = saw_gold or not is_leak(sample.question)
    chain = [sections.get(name, "") for name in SECTIONS[:-1]]
    return sections, {
        "failed": finish_reason == "failed",
        "refused": finish_reason == "refusal" or any(_refuses(text) for text in texts),
        "cut_off": finish_reason in CUT,
        "empty": not any(text.strip() for text in texts),
        "malformed": not all(sections.get(name) for name in SECTIONS),
        "wrong": not is_right(sample, sections.get("conclusion", "")),
        "leaked": told and any(is_leak(text) for text in chain),
    }


def first_reason(verdicts):
    for reason in REASONS:
        if verdicts[reason]:
            return reason
    return ""


def _refuses(text):
    if any(tag in text for tag in ALL_TAGS):
        return False
    return _REFUSAL.match(text.replace("’", "'")) is not None


def _sections_of(reply):
    """{section: text} of a reply; empty for a text that is not well-formed as a whole."""
    if not isinstance(reply, dict):
        parsed = chat.parse(reply)
        found = parsed.sections if parsed.well_formed else {}
    else:
        found = {name: _inside(name, reply.get(name, "")) for name in SECTIONS}
    # Tags in another case are text for the parser, but no sample may hold them.
    return {name: text for name, text in found.items() if text and not TAG.search(text)}


def _inside(name, text):
    """The text of a stage's reply: as it is, or inside the only tag around it, its own or that of
    an answer; "" where tags stand otherwise.

    >>> _inside("caption", "<CAPTION> a dog</CAPTION>")
    'a dog'
    >>> _inside("conclusion", "<answer>two</answer>")
    'two'
    >>> _inside("caption", "<CAPTION> a dog")
    ''
    """
    text = text.strip()
    tags = [name.upper()]
    if name == "conclusion":
        tags.append("answer")
    for tag in tags:
        if text.startswith(f"<{tag}>") and text.endswith(f"</{tag}>"):
            text = text[len(f"<{tag}>"):-len(f"</{tag}>")]
            break
    return "" if TAG.search(text) else text.strip()


class Tally:
    """How many replies were kept, how many dropped, by reason, and what they cost in tokens."""

    def __init__(self):
        self.count = Counter()          # reason, "" of those kept -> replies
        self.tokens_in = 0
        self.tokens_out = 0

    def add(self, reason, usage):
        self.count[reason] += 1
        self.tokens_in += usage.get("prompt_tokens", 0)
        self.tokens_out += usage.get("completion_tokens", 0)

    def replace(self, reason):
        """Takes one out whose question was asked again; its tokens were spent all the same."""
        self.count[reason] -= 1

    @property
    def kept(self):
        return self.count[""]

    @property
    def dropped(self):
        return sum(self.count[reason] for reason in REASONS)

    def text(self):
        """A line for each reason that occurred."""
        lines = [f"{self.kept} of {self.kept + self.dropped} replies kept, "
                 f"{self.tokens_in} tokens in, {self.tokens_out} out"]
        for reason, meaning in REASONS.items():
            if self.count[reason]:
                lines.append(f"  {self.count[reason]:6} {reason:<10} {meaning}")
        if self.count[HELD_OUT]:
            lines.append(f"  {self.count[HELD_OUT]:6} questions of other splits than train stand "
                         "beside them, for evaluation")
        return "\n".join(lines)


# ---------------------------------------------------------------- one record

@dataclass(frozen=True)
class Record:
    """One reply of a teacher, or a question that is held out.

    image: a path, absolute or from the file's folder on; a list of several. text: the whole reply,
    of dropped ones only. prompt: hash of the instructions; served: the model that the endpoint says
    it used; attempt: from 1 on.
    """
    key: str
    reason: str = ""                # "" is kept; else of REASONS, or held_out
    image: object = ""
    question: str = ""
    ground_truth: str = ""
    summary: str = ""
    caption: str = ""
    reasoning: str = ""
    conclusion: str = ""
    # of the question
    id: str = ""
    split: str = ""
    source: str = ""
    aliases: tuple = ()
    choices: tuple = ()
    tolerance: float = 0.0
    unit: str = ""
    boxes: tuple = ()
    # of the reply
    text: object = ""
    verdicts: dict = field(default_factory=dict)
    error: str = ""
    # where it comes from
    teacher: str = ""
    model: str = ""
    served: str = ""
    prompt: str = ""
    parameters: dict = field(default_factory=dict)
    sees_answer: bool = False
    finish_reason: str = ""
    usage: dict = field(default_factory=dict)
    attempt: int = 0

    def line(self):
        """As JSON without empty fields; numbers that are 0 stay."""
        values = {name: value for name, value in asdict(self).items() if value not in ("", (), {})}
        return json.dumps({"key": self.key, "reason": self.reason, **values})


KEY = re.compile("[0-9a-f]{64}")
START = b'{"key": "'        # of every line
NAMES = {option.name for option in fields(Record)}


def read_line(line):
    """A line (bytes) -> Record. Raises ValueError unless it is one."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(values, dict) or not KEY.fullmatch(str(values.get("key"))):
        raise ValueError("expected a JSON object with a key, as train.py --stage=teach writes it")
    if values.get("reason") not in ("", HELD_OUT, *REASONS):
        raise ValueError(f"reason {values.get('reason')!r} must be empty or one of "
                         f"{', '.join((*REASONS, HELD_OUT))}")
    known = {name: value for name, value in values.items() if name in NAMES}
    for name in ("aliases", "choices"):
        known[name] = tuple(known.get(name, ()))
    known["boxes"] = tuple(tuple(box) for box in known.get("boxes", ()))
    return Record(**known)


def is_torn(line):
    """Whether a file's last line is the beginning of a record, or what a crash left in its place.
    Of another kind of file nothing may be cut off."""
    is_ours = line.startswith(START[:len(line)]) or not line.strip(b"\x00\n")
    try:
        json.loads(line)
    except ValueError:
        return is_ours
    return is_ours and not line.endswith(b"\n")


def key_of(model, prompt, sample, pictures, parameters, attempt):
    """What tells a request apart: sha256 over all that its reply and its verdicts depend on.

    pictures: the digests of the sample's pictures.
    """
    gold = [sample.answer, sample.aliases, sample.choices, sample.tolerance, sample.unit]
    parts = [model, prompt, list(pictures), sample.question, gold, parameters, attempt]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest(picture):
    """sha256 over a picture's bytes, of a file or an array as it is. Raises ValueError for a file
    that cannot be read."""
    if isinstance(picture, np.ndarray):
        return hashlib.sha256(f"{picture.shape}".encode() + picture.tobytes()).hexdigest()
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    try:
        with open(picture, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise ValueError(f"image {str(picture)!r} cannot be read: {error.strerror}") from None


# ---------------------------------------------------------------- the file

class RecordFile:
    """A file of records that this process alone adds to; what is in it already is taken up.

    tally: a Tally of all that is in it. writes: whether this process is the one; others that walk
    the same questions only keep count of what it adds. Raises ValueError when another process holds
    the file, or a line before the last is no record. A torn last line is cut off.
    """

    def __init__(self, path, writes=True):
        self.writes = writes
        self.path = os.path.abspath(os.path.expanduser(path))
        self.folder, self.name = os.path.split(self.path)
        self._reasons = {}          # half a key -> reason, some 100 bytes each
        self.tally = Tally()
        self._pictures = set()
        self._turn = threading.Lock()
        if os.path.isdir(self.path):
            raise ValueError(f"--records={path} must be a file, it is a folder")
        os.makedirs(self.folder, exist_ok=True)
        self._file = open(self.path, "a+b" if writes else "rb")
        try:
            if writes:
                self._hold()
            self._take_up()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def _hold(self):
        try:
            if fcntl:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--records={self.path} is in use by another process; wait for its "
                             "end, or choose another file") from None
        except OSError:         # some network file systems have no locks
            pass

    def _take_up(self):
        whole = 0
        for number, line, is_last in _lines(self._file):
            if is_last and is_torn(line):
                if self.writes:
                    self._file.truncate(whole)
                return
            try:
                record = read_line(line)
            except ValueError as error:
                raise ValueError(f"--records={self.path}, line {number}: {error}") from None
            whole += len(line)
            self._count(record)

    def _count(self, record):
        key = _half(record.key)
        if key in self._reasons:
            self.tally.replace(self._reasons[key])
        self._reasons[key] = sys.intern(record.reason)
        self.tally.add(record.reason, record.usage)

    def reason(self, key):
        """Why the reply of this key was dropped, "" of one that was kept; None without one."""
        return self._reasons.get(_half(key))

    def put(self, record):
        """Writes a record, flushed to the disk; of several threads one after the other."""
        line = record.line().encode() + b"\n"
        with self._turn:
            if self.writes:
                self._file.write(line)
                self._file.flush()
                os.fsync(self._file.fileno())
            self._count(record)

    def picture(self, source, name):
        """What a record's `image` is for a picture; name: its digest.

        A path is taken as it is, from the file's folder on where it lies in there; anything else is
        written to FILE.pictures/NAME.png.
        """
        if isinstance(source, (str, os.PathLike)):
            path = os.path.abspath(source)
            inside = path.startswith(self.folder + os.sep)
            return os.path.relpath(path, self.folder) if inside else path
        folder = f"{self.name}.pictures"
        path = os.path.join(self.folder, folder, f"{name}.png")
        if self.writes and name not in self._pictures and not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with written_whole(path, "wb") as file:
                file.write(as_png(source))
        self._pictures.add(name)
        return os.path.join(folder, f"{name}.png")


@contextmanager
def written_whole(path, mode):
    """An open file that takes its name when the block ends, on the disk; many threads may write one
    name at once."""
    partial = f"{path}.{threading.get_ident()}.partial"
    with open(partial, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _half(key):
    return bytes.fromhex(key)[:16]


def as_png(source):
    """A picture (path, encoded bytes or (H, W, 3) uint8 array) -> the bytes of a PNG file, upright,
    in RGB."""
    file = io.BytesIO()
    read_image(source).save(file, "PNG")
    return file.getvalue()


def _lines(file):
    """(number, line, whether it is the last) of a file open for bytes."""
    file.seek(0)
    number = 0
    previous = None
    for line in file:
        if previous is not None:
            yield number, previous, False
        number += 1
        previous = line
    if previous is not None:
        yield number, previous, True


def read(path):
    """Yields the records of a file in its order; a torn last line is left out. Raises ValueError
    naming a line that is no record, and when there is no such file."""
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        problem = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"records file {path!r} {problem}; expected what train.py --stage=teach "
                         "writes")
    with open(path, "rb") as file:
        for number, line, is_last in _lines(file):
            if is_last and is_torn(line):
                return
            try:
                record = read_line(line)
            except ValueError as error:
                raise ValueError(f"records file {path!r}, line {number}: {error}") from None
            yield record


# ---------------------------------------------------------------- from the file to samples

def sample_of(record, folder):
    """Record -> Sample; folder: where relative paths start."""
    names = record.image if isinstance(record.image, list) else [record.image]
    images = tuple(os.path.join(folder, name) for name in names if name)
    return Sample(
        id=record.id, images=images, question=record.question, answer=record.ground_truth,
        summary=record.summary, caption=record.caption, reasoning=record.reasoning,
        conclusion=record.conclusion, aliases=record.aliases, choices=record.choices,
        tolerance=record.tolerance, unit=record.unit, boxes=record.boxes, split=record.split,
        source="records")


def usable(path):
    """Yields the Samples of a file: those kept, with their chains, and those held out, without."""
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(path)))
    for record in read(path):
        if record.reason in ("", HELD_OUT):
            yield sample_of(record, folder)


def load(path, val_percent=20):
    """A file of records -> ({"train": samples with their chains, "val": .., ..}, what was found).
    Of records that name no split the pixels of their pictures decide. Raises ValueError as
    data.splits.divide does, and where nothing was kept."""
    try:
        splits, found = divide(usable, path, val_percent)
    except ValueError:
        _need_kept(path)
        raise
    return splits, f"records: {found}; {len(splits['train'])} with a teacher's chain"


def _need_kept(path):
    """Raises ValueError, with the reasons, for a file of replies of which none was kept."""
    count = Counter(record.reason for record in read(path))
    if count[""]:
        return
    dropped = [f"{count[reason]} {reason}" for reason in REASONS if count[reason]]
    raise ValueError(f"records file {str(path)!r} holds no reply that was kept "
                     f"({', '.join(dropped) or 'none at all'}); nothing can be learned from it")


def export_llava(path, out):
    """Writes the kept records as LLaVA-CoT's JSON: [{"id", "image", "conversations"}, ..], the tags
    in the answer. Returns their number. Image paths stay those of the records, from the records'
    folder on."""
    count = 0
    with written_whole(out, "w") as file:
        file.write("[")
        for record in read(path):
            if record.reason:
                continue
            sections = [getattr(record, name) for name in SECTIONS]
            answer = staged_text(*sections, between="\n\n")
            turns = [{"from": "human", "value": record.question}, {"from": "gpt", "value": answer}]
            value = {"id": record.id, "image": record.image, "conversations": turns}
            file.write((",\n" if count else "\n") + json.dumps(value, ensure_ascii=False))
            count += 1
        file.write("\n]\n")
    return count
