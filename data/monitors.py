"""Drawn patient monitors with questions, `--data=monitors`: a task made by the program from a seed.

Picture: 80 x 80 RGB, 5 x 5 cells of 16 pixels. Two rows of cells hold an ECG trace, a strip of
3 seconds: its beats are its high spikes, and each stands for 20 beats a minute. Three rows hold a
number each, its label in the first cell and its digits, at the right, in the last three:

    HR    heart rate in beats a minute (bpm), green
    O2    oxygen saturation, SpO2, in %, blue
    BP    systolic blood pressure in mmHg, red; there is no room for the diastolic one

A number agrees with the trace when it is at most 10 bpm from 20 x beats; in a share of the pictures
the two contradict each other by more than 30 bpm, and in a share the heart rate is covered. Normal
are the values of RANGES; at most one value is outside of them where a question asks for it.

Question kinds, with their answers: `read` a value ("83 bpm"; a covered heart rate is to be counted
on the trace, so within 10 bpm), `range` (the name of the value that is out of range, or "none"),
`rate` (the trace's rate, within 10 bpm), `agree` (does the number agree with the trace: yes or no).

Splits: `id` as in training; `layout`, the rows in another order; `values`, numbers that no other
split shows; `glare`, a bright blob on the picture.
"""
import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Callable, NamedTuple

import numpy as np

from data.sample import Sample

CELL, CELLS = 16, 5
SIZE = CELL * CELLS
TRACE_ROWS = 2                          # rows of cells, at the top
STRIP = 3                               # seconds that the trace shows
FACTOR = 60 // STRIP                    # beats a minute for each beat of the trace
TOLERANCE = FACTOR / 2                  # of a rate that is counted: half a beat
BEATS = range(2, 10)                    # fewest to most on a trace
CONTRADICTION = 1.5 * FACTOR            # a trace that contradicts the number is further from it than this
CLOSE = 0.4 * FACTOR                    # one that agrees is no further: well inside of the tolerance

VALUES = ("hr", "spo2", "bp")
UNITS = {"hr": "bpm", "spo2": "%", "bp": "mmhg"}
LABELS = {"hr": "HR", "spo2": "O2", "bp": "BP"}
COLORS = {"hr": (60, 230, 90), "spo2": (90, 180, 255), "bp": (255, 100, 90)}
TRACE_COLOR = (90, 240, 120)
SHOWN = {"hr": range(40, 181), "spo2": range(80, 101), "bp": range(70, 200)}    # what a picture may show
RANGES = {"hr": (60, 100), "spo2": (90, 100), "bp": (90, 140)}                  # normal values, both ends included
# Rows from the top, under the trace. The first trains, the second is only tested.
LAYOUTS = {"standard": ("hr", "spo2", "bp"), "other": ("bp", "hr", "spo2")}

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
HIDDEN = "hidden"
NONE = "none"
MIX = {"read": 0.45, "range": 0.15, "rate": 0.2, "agree": 0.2}     # kinds of question and their shares
COVERED = 0.3                           # of the questions about the heart rate's value: it is covered
CONTRADICTED = {"read": 0.2, "range": 0.2, "rate": 0.5, "agree": 0.5}   # shares, by kind of question


def is_held_out(value):
    """Whether only the split `values` shows a number: one of eight, none of them a multiple of the
    trace's factor."""
    return value % 8 == 5


# ---------------------------------------------------------------- what a picture shows

@dataclass(frozen=True)
class Monitor:
    """A picture.

    beats: on the trace; hidden: the heart rate is covered; layout: of LAYOUTS; phase: where the
    first beat stands, as a share of the distance between two; shifts: of the rows' numbers, in
    pixels (x, y); noise: deviation of a channel, of 255; glare: (x, y, radius) of a bright blob in
    pixels, () for none.
    """
    hr: int
    spo2: int
    bp: int
    beats: int
    hidden: bool = False
    layout: str = "standard"
    phase: float = 0.5
    shifts: tuple = ((0, 0), (0, 0), (0, 0))
    noise: float = 6.0
    glare: tuple = ()

    @property
    def rate(self):
        """Beats a minute that the trace shows."""
        return FACTOR * self.beats

    @property
    def agrees(self):
        return abs(self.hr - self.rate) <= TOLERANCE

    def row(self, value):
        """The number of a value's row, from 0 at the top."""
        return LAYOUTS[self.layout].index(value)

    def spelled(self, value):
        """The digits of a value, or that it is covered."""
        if value == "hr" and self.hidden:
            return HIDDEN
        return spelled(getattr(self, value))

    def places(self):
        """x of every beat in pixels, from the left."""
        apart = (SIZE - 2 * EDGE) / self.beats
        return [EDGE + (self.phase + beat) * apart for beat in range(self.beats)]

    def columns(self):
        """The column of every beat: 1 to 5."""
        return [int(x) // CELL + 1 for x in self.places()]


EDGE = 2                                # pixels of the trace at either side without a beat


@dataclass(frozen=True)
class Question:
    """kind: of MIX; value: of VALUES, what `read` asks for."""
    kind: str
    value: str = "hr"

    @property
    def text(self):
        if self.kind == "read":
            return f"what is {self.value} ?"
        if self.kind == "range":
            return "which value is out of range ?"
        if self.kind == "rate":
            return "how fast is the trace ?"
        return "does hr agree with the trace ?"


class Case(NamedTuple):
    """A picture and a question about it."""
    monitor: Monitor
    question: Question


def level(value, number):
    """ "low", "ok" or "high": a number beside the normal range of its value."""
    low, high = RANGES[value]
    if number < low:
        return "low"
    return "high" if number > high else "ok"


def gold(case):
    """-> (the right answer, its unit, its tolerance)"""
    monitor, question = case
    if question.kind == "range":
        out = [value for value in VALUES if level(value, getattr(monitor, value)) != "ok"]
        return (out[0] if out else NONE), "", 0.0
    if question.kind == "agree":
        return ("yes" if monitor.agrees else "no"), "", 0.0
    if question.kind == "rate" or question.value == "hr" and monitor.hidden:
        return f"{monitor.rate} {UNITS['hr']}", UNITS["hr"], TOLERANCE
    unit = UNITS[question.value]
    return f"{getattr(monitor, question.value)} {unit}", unit, 0.0


# ---------------------------------------------------------------- making a case

@dataclass(frozen=True)
class Split:
    """What the cases of a split have in common. held_out: all their numbers are held out, elsewhere
    none is."""
    layout: str = "standard"
    held_out: bool = False
    glare: bool = False

    def make(self, rng):
        """-> Case; rng: a random.Random."""
        kind = rng.choices(list(MIX), list(MIX.values()))[0]
        question = Question(kind)
        if kind == "read":
            question = Question(kind, rng.choice(VALUES))
        contradicts = rng.random() < CONTRADICTED[kind]
        beats = []
        while not beats:                # no trace clearly agrees with a rate half-way between those of two
            numbers = self._numbers(rng, kind)
            beats = [count for count in BEATS if _stands_in_for(count, numbers["hr"], contradicts)]
        hidden = question == Question("read", "hr") and rng.random() < COVERED
        shifts = tuple((rng.randint(-1, 1), rng.randint(-1, 0)) for _ in VALUES)
        glare = ()
        if self.glare:
            glare = (rng.uniform(0, SIZE), rng.uniform(0, SIZE), rng.uniform(8, 16))
        monitor = Monitor(**numbers, beats=rng.choice(beats), hidden=hidden, layout=self.layout,
                          phase=rng.uniform(0.3, 0.7), shifts=shifts, noise=rng.uniform(2, 10), glare=glare)
        return Case(monitor, question)

    def _numbers(self, rng, kind):
        """{value: number}; for a question of kind `range` at most one is out of its range, each
        equally often as none."""
        wanted = {value: None for value in VALUES}
        if kind == "range":
            out = rng.choice((NONE, *VALUES))
            wanted = {value: value == out for value in VALUES}
        return {value: rng.choice(_candidates(value, self.held_out, wanted[value])) for value in VALUES}


@lru_cache
def _candidates(value, held_out, out):
    """Numbers that may be shown. out: only those outside of the normal range, or only those in it;
    None for both."""
    shown = [number for number in SHOWN[value] if is_held_out(number) == held_out]
    if out is None:
        return shown
    return [number for number in shown if (level(value, number) != "ok") == out]


def _stands_in_for(beats, hr, contradicts):
    """Whether a trace of so many beats contradicts this heart rate, or else clearly agrees."""
    apart = abs(hr - FACTOR * beats)
    return apart > CONTRADICTION if contradicts else apart <= CLOSE


TRAIN = Split()
SPLITS = {
    "id": TRAIN,
    # out of distribution
    "layout": Split(layout="other"),
    "values": Split(held_out=True),
    "glare": Split(glare=True),
}
LOOKING = ("clip", "align", "sft")      # what the first stages look at


# ---------------------------------------------------------------- drawing

# 5 x 7 dots a digit, drawn 2 x 2 pixels each; rows from the top, a letter for each dot that is lit.
DIGITS = tuple(glyph.split() for glyph in (
    ".###. #...# #..## #.#.# ##..# #...# .###.",
    "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    ".###. #...# ....# ..##. .#... #.... #####",
    "####. ....# ....# .###. ....# ....# ####.",
    "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "##### #.... ####. ....# ....# #...# .###.",
    "..##. .#... #.... ####. #...# #...# .###.",
    "##### ....# ...#. ..#.. ..#.. .#... .#...",
    ".###. #...# #...# .###. #...# #...# .###.",
    ".###. #...# #...# .#### ....# ...#. .##..",
))
# 3 x 5 dots a letter of a label.
LETTERS = {letter: glyph.split() for letter, glyph in {
    "H": "#.# #.# ### #.# #.#", "R": "##. #.# ##. #.# #.#", "O": "### #.# #.# #.# ###",
    "2": "##. ..# .#. #.. ###", "B": "##. #.# ##. #.# ##.", "P": "##. #.# ##. #.. #.."}.items()}
DOT = 2                                 # pixels of a dot's side
FIRST_DIGIT = CELLS - 3                 # column of cells, from 0
DIGIT_CORNER = (3, 1)                   # of a glyph in its cell, (x, y) in pixels; shifts stay inside
BACKGROUND = (14, 16, 20)
COVER = (110, 110, 115)


def _mask(rows):
    """Rows of dots -> (h, w, 1) float32, 1 where a dot is lit."""
    dots = np.array([[dot == "#" for dot in row] for row in rows], np.float32)
    return dots.repeat(DOT, 0).repeat(DOT, 1)[..., None]


DIGIT_MASKS = tuple(_mask(rows) for rows in DIGITS)             # (14, 10, 1) each
LABEL_MASKS = {}                                                # (10, 14, 1) each
for _value, (_first, _second) in LABELS.items():
    _gap = np.zeros((10, DOT, 1), np.float32)
    LABEL_MASKS[_value] = np.concatenate([_mask(LETTERS[_first]), _gap, _mask(LETTERS[_second])], 1)


def draw(monitor, rng):
    """A Monitor -> (80, 80, 3) uint8; rng: a numpy Generator, of the noise."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = BACKGROUND
    trace = coverage(monitor)[..., None]
    height = len(trace)
    canvas[:height] += trace * (np.array(TRACE_COLOR, np.float32) - canvas[:height])
    for value in VALUES:
        row = monitor.row(value)
        top = (TRACE_ROWS + row) * CELL
        color = np.array(COLORS[value], np.float32)
        _paint(canvas, LABEL_MASKS[value], 1, top + 3, color)
        if value == "hr" and monitor.hidden:
            canvas[top + 1:top + CELL - 1, FIRST_DIGIT * CELL:] = COVER
            continue
        right, down = monitor.shifts[row]
        for place, digit in enumerate(f"{getattr(monitor, value):>3}"):
            if digit != " ":
                x = (FIRST_DIGIT + place) * CELL + DIGIT_CORNER[0] + right
                _paint(canvas, DIGIT_MASKS[int(digit)], x, top + DIGIT_CORNER[1] + down, color)
    if monitor.glare:
        canvas += _blob(*monitor.glare)[..., None] * (255 - canvas)
    noise = rng.standard_normal(canvas.shape, np.float32)
    noise *= monitor.noise
    canvas += noise
    return canvas.clip(0, 255, out=canvas).astype(np.uint8)


def _paint(canvas, mask, x, y, color):
    """Draws a glyph whose upper left corner is (x, y)."""
    height, width, _ = mask.shape
    below = canvas[y:y + height, x:x + width]
    below += mask * (color - below)


def _blob(x, y, radius):
    """(80, 80) float32: how much of each pixel is glare, .85 in the middle."""
    side = np.arange(SIZE, dtype=np.float32) + 0.5
    across = np.exp(-0.5 * ((side - x) / radius) ** 2)
    down = np.exp(-0.5 * ((side - y) / radius) ** 2)
    return 0.85 * down[:, None] * across[None]


# The trace, in pixels: its base line and the height of a spike, measured down from the top and up from the base.
BASE, SPIKE, HALF_WIDTH, WAVE = 26.0, 21.0, 2.2, 3.0
LINE = 0.8                              # half the thickness of the line


def coverage(monitor):
    """(32, 80) float32: how much of each pixel the line of the trace covers."""
    edges = np.linspace(0, SIZE, SIZE * 2 + 1)                  # half pixels
    height = np.zeros_like(edges)
    apart = (SIZE - 2 * EDGE) / monitor.beats
    for x in monitor.places():
        height += SPIKE * np.clip(1 - abs(edges - x) / HALF_WIDTH, 0, None)
        height += WAVE * np.exp(-0.5 * ((edges - x - 0.45 * apart) / (0.1 * apart)) ** 2)
    y = BASE - height
    through = np.stack([y[0:-2:2], y[1:-1:2], y[2::2]])         # (3, 80): at both edges and the middle of a column
    high = through.min(0) - LINE
    low = through.max(0) + LINE
    rows = np.arange(TRACE_ROWS * CELL)[:, None]
    return np.clip(np.minimum(rows + 1, low) - np.maximum(rows, high), 0, 1).astype(np.float32)


# ---------------------------------------------------------------- words

def spelled(number):
    """A number as thoughts and captions write it, digit by digit.

    >>> spelled(120)
    '1 2 0'
    """
    return " ".join(str(number))


def counted(columns):
    """Beats counted one by one, each with the column that it stands in.

    >>> counted([1, 2, 2])
    'c1 one c2 two c2 three'
    """
    return " ".join(f"c{column} {NUMBERS[count]}" for count, column in enumerate(columns, 1))


def entries(monitor):
    """What a picture shows, an entry for each row from the top and one for the trace."""
    rows = []
    for value in LAYOUTS[monitor.layout]:
        rows.append(f"{value} {monitor.spelled(value)}")
    return [*rows, f"trace {counted(monitor.columns())}"]


def caption(monitor):
    """ "hr 8 3 , spo2 9 7 , bp 1 2 0 , trace c1 one c2 two c4 three c5 four" """
    return " , ".join(entries(monitor))


def partial_caption(monitor, rng):
    """For contrastive training: one or two of the entries, in random order; of the trace only how
    many beats it has.

    Whole captions are told apart by any one of their numbers, and leave the others unlearned.
    """
    *rows, _ = entries(monitor)
    said = [*rows, f"trace {NUMBERS[monitor.beats]}"]
    return " , ".join(rng.sample(said, rng.choice((1, 2))))


def looking_question(monitor, rng):
    """-> (question, answer), for the first fine-tuning: which row, which digits, which beats."""
    value = rng.choice(VALUES)
    kind = rng.randrange(4)
    if kind == 0:
        return f"where is {value} ?", f"r{monitor.row(value) + 1}"
    if kind == 1:
        return "where are the beats ?", counted(monitor.columns())
    if kind == 2:
        return f"which digits has {value} ?", monitor.spelled(value)
    if value == "hr" and monitor.hidden:
        value = "spo2"                  # what a covered number is takes counting
    return f"what is {value} ?", f"{getattr(monitor, value)} {UNITS[value]}"


def pieces():
    """The tokens of this world: words with the space before them; digits also without, so that a
    number is as many tokens as it has digits."""
    words = {*VALUES, *UNITS.values(), *NUMBERS, HIDDEN, NONE, *"0123456789"}
    words |= {f"c{column}" for column in range(1, CELLS + 1)}
    words |= {f"r{row}" for row in range(1, len(VALUES) + 1)}
    words |= set("what is which value out of range how fast the trace does agree with where are beats digits has x "
                 "near far low ok high yes no think inside then answer ? . ,".split())
    return [*(f"▁{word}" for word in sorted(words)), *"0123456789"]


# ---------------------------------------------------------------- the teacher

CONFUSED = {"3": "8", "8": "3"}
FIND, COUNT = 2, 2          # finding a row, and counting a trace, are as hard as so many steps


@dataclass(frozen=True)
class MonitorTeacher:
    """Chains of thought with the errors of one who reads monitors badly; all rates are
    probabilities, with all zero the chains are flawless.

    slip: each step goes wrong at random: it reads another row than the one asked for, or misses a
    beat or counts one twice (FIND and COUNT times as often as a single step). confuse: it reads a 3
    as an 8 and an 8 as a 3. drop_hop: it trusts the number, and does not look at the trace.
    """
    slip: float = 0.06
    confuse: float = 0.65
    drop_hop: float = 0.60

    def __call__(self, case, rng):
        """-> (reasoning, conclusion); rng: a random.Random."""
        monitor, question = case
        if question.kind == "range":
            return self._range(monitor, rng)
        if question.kind == "agree":
            return self._agree(monitor, rng)
        if question.kind == "rate" and rng.random() >= self.drop_hop:
            return self._count(monitor, rng, "")
        words, number = self._find(monitor, question.value, rng)
        if number is None:
            return self._count(monitor, rng, f"{words} ")
        return words, f"{number} {UNITS[question.value]}"

    def _count(self, monitor, rng, before):
        """Beats, one by one, and the rate; before: the words in front."""
        words, rate = self._trace(monitor, rng)
        return f"{before}{words}", f"{rate} {UNITS['hr']}"

    def _agree(self, monitor, rng):
        """Number, rate of the trace, and whether they are near each other."""
        words, number = self._find(monitor, "hr", rng)
        if rng.random() < self.drop_hop:
            return f"{words} near", "yes"
        looked, rate = self._trace(monitor, rng)
        if abs(number - rate) <= TOLERANCE:
            return f"{words} {looked} near", "yes"
        return f"{words} {looked} far", "no"

    def _range(self, monitor, rng):
        """Row by row, up to the first value that is out of its range."""
        words = []
        for value in LAYOUTS[monitor.layout]:
            number = self._digits(getattr(monitor, value), rng)
            found = level(value, number)
            words.append(f"{value} {spelled(number)} {found}")
            if found != "ok":
                return " ".join(words), value
        return " ".join(words), NONE

    def _find(self, monitor, value, rng):
        """-> (value, row and digits in words, the number; None for one that is covered)"""
        seen = value
        if rng.random() < FIND * self.slip:
            others = [other for other in VALUES if other != value and not (other == "hr" and monitor.hidden)]
            seen = rng.choice(others)
        words = f"{value} r{monitor.row(seen) + 1}"
        if seen == "hr" and monitor.hidden:
            return f"{words} {HIDDEN}", None
        number = self._digits(getattr(monitor, seen), rng)
        return f"{words} {spelled(number)}", number

    def _digits(self, number, rng):
        """The number that it takes a number for."""
        read = ""
        for digit in str(number):
            wrong = digit in CONFUSED and rng.random() < self.confuse
            read += CONFUSED[digit] if wrong else digit
        return int(read)

    def _trace(self, monitor, rng):
        """-> (the beats in words, the rate)"""
        columns = monitor.columns()
        if rng.random() < COUNT * self.slip:
            place = rng.randrange(len(columns))
            if rng.random() < 0.5:
                del columns[place]
            else:
                columns.insert(place, columns[place])
        rate = FACTOR * len(columns)
        return f"trace {counted(columns)} x {FACTOR} {spelled(rate)}", rate


PERFECT = MonitorTeacher(slip=0.0, confuse=0.0, drop_hop=0.0)


# ---------------------------------------------------------------- samples

def load(split, count, seed, teacher=None):
    """`count` samples of a split, made from `seed`.

    split: "clip" (partial captions), "align" (captions, in order and shuffled), "sft" (questions
    about looking); or "train", "val" or one of SPLITS, questions that need thinking, for which
    `teacher(case, rng) -> (reasoning, conclusion)` fills those two fields. Cases, words, chains and
    noise have random streams of their own: a sample is the same whatever `count`, and its picture
    and question whatever the teacher. Raises ValueError for another split.
    """
    asking = {"train": TRAIN, "val": TRAIN, **SPLITS}
    if split not in LOOKING and split not in asking:
        raise ValueError(f"split {split!r} must be one of {', '.join((*LOOKING, *asking))}")
    rng = random.Random(f"monitors {split} {seed}")
    samples = []
    for i in range(count):
        case = asking.get(split, TRAIN).make(rng)
        words = random.Random(f"monitors words {split} {seed} {i}")
        if split in LOOKING:
            texts = _looking_texts(split, case.monitor, words)
        else:
            texts = _asking_texts(case, words, teacher)
        image = draw(case.monitor, np.random.default_rng([seed, i, *f"monitors {split}".encode()]))
        samples.append(Sample(id=f"{split}-{seed}-{i}", images=(image,), split=split,
                              source=f"monitors/{case.question.kind}", **texts))
    return samples


def _looking_texts(split, monitor, rng):
    """The fields of a sample of "clip", "align" or "sft" that hold its texts."""
    if split == "clip":
        return dict(caption=partial_caption(monitor, rng))
    if split == "align":
        said = entries(monitor)
        if rng.random() < 0.5:
            rng.shuffle(said)
        return dict(caption=" , ".join(said))
    question, answer = looking_question(monitor, rng)
    return dict(question=question, answer=answer, caption=caption(monitor))


def _asking_texts(case, rng, teacher):
    """The fields of a sample of one of the other splits that hold its texts."""
    answer, unit, tolerance = gold(case)
    texts = dict(question=case.question.text, answer=answer, unit=unit, tolerance=tolerance,
                 caption=caption(case.monitor))
    if teacher:
        texts["reasoning"], texts["conclusion"] = teacher(case, rng)
    return texts


@dataclass(frozen=True)
class World:
    """As scenes.World, as far as a supply of samples asks it."""
    splits: dict = field(default_factory=lambda: SPLITS)
    parts: dict = field(default_factory=dict)
    teacher: Callable = MonitorTeacher

    def load(self, split, count, seed, teacher=None, staged=False):
        """As `load`; chains have no stages here, `staged` is refused. Raises ValueError for it."""
        if staged:
            raise ValueError("monitors have no chains in four sections; expected cot_format think")
        return load(split, count, seed, teacher)

    def pieces(self):
        return pieces()


WORLD = World()
