"""What --data names: samples for every purpose, and the text that a new tokenizer is trained on.

    supply = Supply(cfg.data, cfg.teacher, cfg.run.seed)
    supply.samples("align", 16000, "align")     # drawn scenes; pictures of a folder or file; or a LLaVA file's records
"""
import math
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from data import augment, chat, images, jsonl, llava, records, scenes, sets, skills, teachers, worlds
from data.answers import key
from data.sample import CACHE_BYTES, Sample
from data.splits import few_shots, mixed
from data.worlds import DRAWN, world_of
from model.runs.config import check_fields, choice, need, number

# Random streams by name: what is drawn for one purpose stays the same whatever else a run draws. The numbers are part
# of every seed and never change.
STREAMS = {"clip": 1, "align": 2, "sft": 3, "cot": 4, "continued": 5, "rl": 6, "rejection": 7, "tokenizer": 9,
           "budget": 11, "records": 12, "replay": 13, "replay_again": 14, "shots": 15}

# source -> load(folder or file, val_percent) -> ({"train": samples, "val": samples, ..}, what was found). For one that
# yields Samples row by row: functools.partial(data.splits.divide, its function).
SOURCES = {"images": images.load, "torchvision": sets.load, "jsonl": jsonl.load, "records": records.load}
WITH_CLASSES = ("images", "torchvision")                   # sources whose answers are classes of pictures
NAMED_BY = {"images": "DIR", "torchvision": "NAME@DIR"}     # what stands behind a source; else FILE


@dataclass(frozen=True)
class DataOptions:
    """pictures and questions"""
    data: str = "scenes"                            # scenes | monitors | images:DIR | torchvision:NAME@DIR | jsonl: ..
    download: bool = False                          # torchvision may fetch the set of --data=torchvision:NAME@DIR
    shots: int = number(0, "[0, 1000000]")          # training pictures a class, of images and torchvision; 0: all
    augment: str = ""                               # random changes to clip's pictures: some of flip,crop,colour
    world: str = choice(*worlds.WORLDS)             # of drawn scenes: what is asked, in training and in tests
    template: str = choice("brief", "auto", *chat.TEMPLATES)  # how turns are written: data/chat.py | by the tokenizer
    pictures: int = number(16000, "[1, 100000000]")  # drawn for clip and for align
    questions: int = number(12000, "[1, 100000000]")  # drawn for sft
    skills: bool = False                            # sft on drawn scenes teaches small skills beside looking
    replay: float = number(0.0, "[0, 1)")           # drawn pictures: share of captions and looking in cot's records
    traces: int = number(10000, "[1, 100000000]")   # teacher's chains for cot, and as many fresh ones to continue
    rl_prompts: int = number(4800, "[1, 100000000]")  # drawn for rl
    eval_set: str = choice(*scenes.TEST_SEED)       # prompts of the evaluation: test | val, for tuning
    val_percent: int = number(20, "[1, 99]")        # of a folder or file without its own split
    image_root: str = ""                            # folder that the image paths of --data=llava:FILE start from
    bad_records: str = choice("skip", "stop")       # unusable ones of --data=llava:FILE: skipped, noted | an error
    image_fit: str = choice("", "crop", "pad")      # how pictures become square; align crops; empty: the model's
    max_length: int = number(0, "[0, 1000000]")     # tokens of a record in supervised stages; 0: any number
    group_lengths: bool = False                     # of --data=llava:FILE: batches of records of like length

    def __post_init__(self):
        check_fields(self)
        source, _ = source_of(self.data)
        need(source == "torchvision" or not self.download, "download", self.download,
             f"come with --data=torchvision:NAME@DIR, not with --data={self.data}")
        need(source in WITH_CLASSES or not self.shots, "shots", self.shots,
             f"be 0 with --data={self.data}, which has no classes")
        augment.names_in(self.augment)
        need(source not in DRAWN or not self.augment, "augment", self.augment,
             "be left out with drawn pictures, whose captions say what is where in which colour")


def source_of(data):
    """--data -> (one of DRAWN, llava or one of SOURCES; the folder or file behind it, "" for what is drawn). Raises
    ValueError for anything else."""
    source, colon, where = data.partition(":")
    known = source in (*DRAWN, "llava", *SOURCES)
    if not known or (source in DRAWN and colon) or (source not in DRAWN and not where):
        others = [f"{name}:{NAMED_BY.get(name, 'FILE')}" for name in SOURCES]
        raise ValueError(f"--data={data} must be {', '.join(DRAWN)}, {', '.join(others)} or llava:FILE")
    return source, where


def real_data(data, val_percent, download=False):
    """--data -> ({"train": samples, "val": samples, ..}, what was found); (None, "") for what has no such splits.

    download: of a published set. Raises ValueError for anything else than what is drawn, llava:FILE or one of SOURCES,
    and for what `load` refuses.
    """
    source, where = source_of(data)
    if source not in SOURCES:
        return None, ""
    options = dict(download=True) if download else {}
    splits, found = SOURCES[source](where, val_percent, **options)
    answers = {key(sample.answer, sample.unit): sample.answer for sample in splits["train"]}
    if len(answers) == 1:
        raise ValueError(f"--data={data}: all training answers are {answers.popitem()[1]!r}; there is nothing to tell "
                         "apart")
    for split, samples in splits.items():
        if split != "train":
            splits[split] = mixed(samples)
    return splits, found


def scene_teacher(options, world=scenes.GRID):
    """The teacher of a world of drawn pictures."""
    make = world.teacher or teachers.SceneTeacher
    return make(options.slip, options.confuse, options.drop_hop)


class Supply:
    """real: splits of a folder or file of one's own, or None; records: a LLaVA file's, or empty; bad: those of them
    that could not be used."""

    def __init__(self, options, teacher_options, seed):
        self.options = options
        self.seed = seed
        self.staged = teacher_options.cot_format == "llava_cot"
        self.world = world_of(options.data, options.world)
        self.teacher = scene_teacher(teacher_options, self.world)
        self.flawless = scene_teacher(replace(teacher_options, slip=0.0, confuse=0.0, drop_hop=0.0), self.world)
        self.teach = None                               # the function of --teacher
        if teacher_options.teacher:
            self.teach = teachers.own_teacher(teacher_options.teacher)
        self.real, self.found = real_data(options.data, options.val_percent, options.download)
        if options.shots:
            few = few_shots(self.real["train"], options.shots, self.stream("shots"))
            self.found += f"; --shots={options.shots}: {len(few)} of {len(self.real['train'])} to train on"
            self.real["train"] = few
        self.records = []
        self._tests = {}                                # (count of prompts, eval_set) -> what `tests` returns
        self._some_texts = None                         # what `some_texts` returns
        self.bad = llava.Bad(options.bad_records)
        source, where = source_of(options.data)
        if source == "llava":
            self.records = llava.Records(where, options.image_root)
            self.found = f"llava: {len(self.records)} records"

    @property
    def source(self):
        """What the samples come from: one of DRAWN, llava or one of SOURCES."""
        return source_of(self.options.data)[0]

    @property
    def has_classes(self):
        """Whether the answers are classes of pictures."""
        return self.source in WITH_CLASSES

    def stream(self, name):
        """The seed of drawn scenes and chains of one purpose."""
        return 1000 * self.seed + STREAMS[name]

    def samples(self, purpose, count, stream, teacher=None):
        """Samples to train on, for a purpose (clip, align, sft, train, a part of the world); `count` scenes are drawn
        anew from the seed and `stream`."""
        if self.records:
            return self.records
        if self.real:
            return self.real["train"]
        staged = self.staged and teacher is not None
        return self.world.load(purpose, count, self.stream(stream), teacher, staged)

    def first_answers(self):
        """[(sample, target text)] of stage sft: answers without a chain; with --skills also the small skills that
        staged prompting calls upon."""
        count = self.options.questions
        if self.options.skills:
            return skills.skills(count, self.stream("sft"))
        samples = self.samples("sft", count, "sft")
        return [(sample, chat.target_text(sample.answer)) for sample in samples]

    def tests(self, count, eval_set=""):
        """{split: samples} to evaluate on, never trained on; `count` scenes of each, the same for every seed. With a
        teacher's chains where there is one, which are the same for every seed, too. eval_set: of TEST_SEED, instead of
        --eval-set."""
        key = count, eval_set or self.options.eval_set
        if key not in self._tests:
            self._tests[key] = self._make_tests(*key)
        return self._tests[key]

    def _make_tests(self, count, eval_set):
        seed = scenes.TEST_SEED[eval_set]
        if self.real:
            tests = {split: samples for split, samples in self.real.items() if split != "train"}
        else:
            tests = {}
            for split in self.world.splits:
                tests[split] = self.world.load(split, count, seed, self.teacher)
        if self.teach:
            for split, samples in tests.items():
                tests[split] = teachers.taught(samples, self.teach, seed)
        return tests

    def of_parts(self, count, eval_set=""):
        """{part of the world: prompts of --eval-set}, `count` of each; nothing trains on them."""
        seed = scenes.TEST_SEED[eval_set or self.options.eval_set]
        return {part: self.world.load(part, count, seed) for part in self.world.parts}

    def taught(self, samples, stream):
        """Samples with the chains of the user's own teacher."""
        return teachers.taught(samples, self.teach, self.stream(stream))

    def decoded(self, sample, pixels):
        """A LLaVA file's sample with its pictures decoded, others as they are; pixels: arguments of `collate`."""
        return self.records.decoded(sample, pixels) if self.records else sample

    def pictured(self, number, sample, pixels):
        """A sample that pairs one picture with a caption, decoded; BadRecord for any other."""
        if len(sample.images) != 1:
            raise llava.BadRecord("no pair", number, sample.id,
                                  f"{len(sample.images)} pictures, one must go with a caption")
        return self.decoded(sample, pixels)

    def kept_pictures(self, size):
        """Bytes of decoded pictures, `size` pixels a side, that are kept for the next epoch: of files, up to a bound.
        Those that are drawn are there already."""
        records = self.records or (self.real or {}).get("train", ())
        if not len(records):
            return 0
        pictures = len(records)
        if self.real:
            pictures = sum(not isinstance(picture, np.ndarray) for sample in records for picture in sample.images)
        return min(CACHE_BYTES, pictures * 3 * size ** 2)

    def begin(self, stage, lines):
        """A new tally for a stage, with what the log's lines already say of it."""
        self.bad = llava.Bad(self.options.bad_records)
        for line in lines:
            if line["stage"] == stage and "bad_record" in line:
                self.bad.note(line)

    def usable(self, records, indices, use, log):
        """use(i, records[i]) of those records that can be used; log(bad_record=why, ..) of the others, once, or under
        --bad-records=stop the ValueError."""
        for i in indices:
            try:
                yield use(i, records[i])
            except llava.BadRecord as error:
                if self.bad.see(error):
                    log(bad_record=str(error), number=int(error.number), kind=error.kind, name=error.name)

    def check(self, records):
        """Prints which records could not be used. Raises ValueError when none could."""
        if self.bad.seen:
            print(self.bad.report(), flush=True)
        if records and len(self.bad.seen) == len(records):
            raise ValueError(f"--data={self.options.data}: no record of it could be used; {self.bad.report()}")

    def own(self):
        """All samples of a folder or file of one's own, as a list; of a LLaVA file a part; none of drawn scenes."""
        if self.records:
            file = Sample(id=f"{len(self.records)} records, {self.records.stop[-1]} bytes")
            return [file, *self.records.first(1000)]
        if self.real:
            return list(chain.from_iterable(self.real.values()))
        return []

    def corpus(self):
        """Texts for a new tokenizer, and words that it shall not split."""
        texts = []
        words = list(chat.TAGS)
        if self.staged or self.options.skills:
            words += chat.STAGE_TAGS
        if self.records:
            for sample in self.records.first(2000):
                for turn in [*sample.turns, (sample.question, sample.answer)]:
                    texts += turn
        elif self.real:
            texts.append("it looks like or . it is")
            for sample in self.real["train"]:
                texts += [sample.question, sample.answer, sample.summary, sample.caption, sample.reasoning]
            texts = [text for text in texts if text]
        else:
            words += self.world.pieces()
            for sample in self.samples("train", 1000, "tokenizer", self.teacher):
                texts.append(f"{sample.question} {sample.reasoning} {sample.caption}")
            if self.staged or self.options.skills:
                words += skills.pieces()
        if self.teach:
            for sample in self.taught(self.samples("train", 1000, "tokenizer")[:1000], "tokenizer"):
                texts += [sample.reasoning, sample.conclusion]
        for method in ("direct", "think", "asked"):
            texts += [chat.PROMPTS[method].brief.replace(tag, "") for tag in chat.TAGS]
        texts = [f" {text}" for text in texts]
        self._some_texts = texts[::math.ceil(len(texts) / 1000)]
        return texts, list(dict.fromkeys(words))

    def some_texts(self):
        """At most 1,000 of the texts of `corpus`, which is drawn anew unless a tokenizer was trained on it."""
        if self._some_texts is None:
            self.corpus()
        return self._some_texts
