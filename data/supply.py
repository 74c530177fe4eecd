"""What --data names: samples for every purpose, and the text that a new tokenizer is trained on.

    supply = Supply(cfg)            # fields data, image_root, bad_records, val_percent, seed, eval_set, the teacher's
    supply.samples("align", 16000)  # drawn scenes; a folder's, a file's training pictures; or a LLaVA file's records
"""
from data import chat, images, jsonl, llava, scenes, teachers
from data.answers import key
from data.sample import Sample
from data.splits import mixed

TEST_SEED = {"test": 1_000_001, "val": 2_000_002}     # the same prompts for every method and every training seed


def source_of(data):
    """--data -> (scenes, images, jsonl or llava; the folder or file behind it, "" for scenes). Raises ValueError for
    anything else."""
    source, _, where = data.partition(":")
    if source not in ("scenes", "images", "jsonl", "llava") or (source != "scenes") != bool(where):
        raise ValueError(f"--data={data} must be scenes, images:DIR, jsonl:FILE or llava:FILE")
    return source, where


def real_data(data, val_percent):
    """--data -> ({"train": samples, "val": samples}, what was found); (None, "") for what has no such splits.

    Raises ValueError for anything else than scenes, images:DIR, jsonl:FILE or llava:FILE, and for what `load` refuses.
    """
    source, where = source_of(data)
    if source in ("scenes", "llava"):
        return None, ""
    splits, found = {"images": images, "jsonl": jsonl}[source].load(where, val_percent)
    answers = {key(sample.answer, sample.unit): sample.answer for sample in splits["train"]}
    if len(answers) == 1:
        raise ValueError(f"--data={data}: all training answers are {answers.popitem()[1]!r}; there is nothing to tell "
                         "apart")
    return {**splits, "val": mixed(splits["val"])}, found


def scene_teacher(cfg):
    """The teacher of drawn scenes. Scenes are drawn together with its chains: another teacher, other scenes."""
    return teachers.SceneTeacher(cfg.slip, cfg.confuse, cfg.drop_hop)


class Supply:
    """real: splits of a folder or file of one's own, or None; records: a LLaVA file's, or empty; bad: those of them
    that could not be used."""

    def __init__(self, cfg):
        self.cfg, self.teacher = cfg, scene_teacher(cfg)
        self.real, self.found = real_data(cfg.data, cfg.val_percent)
        self.records, self.bad = [], llava.Bad(cfg.bad_records)
        if cfg.data.startswith("llava:"):
            self.records = llava.Records(cfg.data.removeprefix("llava:"), cfg.image_root)
            self.found = f"llava: {len(self.records)} records"

    def samples(self, what, count=0, part=0, teacher=None):
        """Samples of a purpose (clip, align, sft, train) or a split; scenes are drawn anew from the seed and `part`."""
        if self.records:
            return self.records
        if self.real:
            return self.real["val" if what == "val" else "train"]
        if what in scenes.SPLITS:
            return scenes.load(what, count, TEST_SEED[self.cfg.eval_set], teacher)
        return scenes.load(what, count, 1000 * self.cfg.seed + part, teacher)

    def decoded(self, sample, pixels):
        """A LLaVA file's sample with its pictures decoded, others as they are; pixels: arguments of `collate`."""
        return self.records.decoded(sample, pixels) if self.records else sample

    def pictured(self, i, sample, pixels):
        """A sample that pairs one picture with a caption, decoded; BadRecord for any other."""
        if len(sample.images) != 1:
            raise llava.BadRecord("no pair", i, sample.id, f"{len(sample.images)} pictures, one must go with a caption")
        return self.decoded(sample, pixels)

    def begin(self, stage, lines):
        """A new tally for a stage, with what the log's lines already say of it."""
        self.bad = llava.Bad(self.cfg.bad_records)
        for line in lines:
            if line["stage"] == stage and "bad_record" in line:
                self.bad.seen[line["number"]] = line["kind"], line["name"]

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
        """Says which records could not be used. Raises ValueError when none could."""
        if self.bad.seen:
            print(self.bad.report(), flush=True)
        if records and len(self.bad.seen) == len(records):
            raise ValueError(f"--data={self.cfg.data}: no record of it could be used; {self.bad.report()}")

    def own(self):
        """All samples of a folder or file of one's own, as a list; of a LLaVA file a part; none of drawn scenes."""
        if self.records:
            return [Sample(id=f"{len(self.records)} records, {self.records.stop[-1]} bytes"), *self.records.first(1000)]
        return [sample for split in (self.real or {}).values() for sample in split]

    def corpus(self):
        """Texts for a new tokenizer, and words that it shall not split."""
        words = []
        if self.records:
            texts = [f" {text}" for sample in self.records.first(2000) for turn in
                     [*sample.turns, (sample.question, sample.answer)] for text in turn]
        elif self.real:
            texts = [" it looks like or . it is", *(f" {text}" for s in self.real["train"] for text in
                                                    (s.question, s.answer, s.caption, s.reasoning) if text)]
        else:
            texts = [f" {s.question} {s.reasoning} {s.caption}"
                     for s in self.samples("train", 1000, part=9, teacher=self.teacher)]
            words = scenes.pieces()
        texts += [f" {prompt.replace(tag, '')}" for prompt in chat.PROMPTS.values() for tag in chat.TAGS]
        return texts, [*chat.TAGS, *words]
