"""What a stage will read, looked at before it starts: the lengths for a plan of memory, a batch for a measured step.

    look = Preview(supply, tokenizer, image_tokens, cfg.data, cfg.teacher)
    rows = look.rows("sft")             # [(ids, target mask, pictures)] of at most MOST records
    longest(rows)
"""
from functools import partial

import numpy as np

from data import chat, teachers
from data.llava import BadRecord, shortened

MOST = 1000                 # records that are encoded; more of them would hardly be longer


def spread(count, most=MOST):
    """At most `most` of `count` indices, evenly spread over them.

    >>> spread(3), spread(10, most=4)
    ([0, 1, 2], [0, 3, 6, 9])
    """
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist() if count else []


def encoded(records, encode):
    """encode(i, record) -> (ids, target mask, pictures) of records spread over all, without those that cannot be
    used."""
    rows = []
    for i in spread(len(records)):
        try:
            rows.append(encode(i, records[i]))
        except BadRecord:
            pass
    return rows


def longest(rows):
    """Tokens of the longest of encoded rows, 0 without one."""
    return max((len(ids) for ids, _, _ in rows), default=0)


class Preview:
    """options, teacher_options: DataOptions and TeacherOptions of the run."""

    def __init__(self, supply, tokenizer, image_tokens, options, teacher_options):
        self.supply = supply
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.options = options
        self.teacher_options = teacher_options

    @property
    def records(self):
        return self.supply.records or self.supply.real["train"]

    def count(self):
        """Records of one's own that a stage learns from."""
        return len(self.records)

    def rows(self, stage, method=""):
        """[(ids, target mask, pictures)] of at most MOST of one's own records, as a stage learns from them: clip,
        align, sft, cot, or any other, which answers them, `method` being how it is asked. Of clip the ids of the
        caption alone."""
        records = self.records
        if stage == "cot":
            return self.chains([records[i] for i in spread(len(records))])
        if stage == "sft" and self.supply.records:
            return self.sft_of_conversations(records)
        ways = {"clip": self.caption, "align": self.plain, "sft": self.answer}
        return encoded(records, ways.get(stage) or partial(self.prompt, method))

    def longest(self, stage, method=""):
        """Tokens of the longest record of a stage. Conversations of a LLaVA file are too long to be encoded in large
        numbers: all of them are taken at what their bytes say."""
        if stage == "sft" and self.supply.records:
            lengths = self.supply.records.lengths(self.image_tokens)
            return self.cut(int(lengths.max()))
        return longest(self.rows(stage, method))

    def cut(self, length):
        limit = self.options.max_length
        return min(length, limit) if limit else length

    def caption(self, _, sample):
        ids = self.tokenizer.encode(" " + sample.caption) + [self.tokenizer.eos_id]
        return ids, [False] * len(ids), sample.images

    def plain(self, number, sample):
        row = chat.encode_plain(sample, self.tokenizer, self.image_tokens, self.options.template)
        return self.shortened(row, number, sample)

    def answer(self, number, sample, target=None, method="direct"):
        target = target or chat.target_text(sample.answer)
        row = chat.encode(sample, self.tokenizer, self.image_tokens, method, self.options.template, target)
        return self.shortened(row, number, sample)

    def prompt(self, method, _, sample):
        return chat.encode(sample, self.tokenizer, self.image_tokens, method, self.options.template)

    def shortened(self, row, number, sample):
        limit = self.options.max_length
        if not limit:
            return row
        return shortened(row, limit, self.image_tokens, self.tokenizer.image_id, number, sample.id)

    def sft_of_conversations(self, records):
        def whole(number, sample):
            return self.answer(number, sample, target=sample.answer)

        return encoded(records, whole)

    def chains(self, samples):
        """Samples with a chain as target: their own, the teacher's, or one over the longest answers that could be
        candidates."""
        form = self.teacher_options.cot_format
        if self.supply.teach:
            samples = self.supply.taught(samples, "cot")
        else:
            answers = sorted({sample.answer for sample in samples}, key=len)
            likely = answers[-self.teacher_options.candidates:]
            samples = teachers.candidate_chains(samples, [likely] * len(samples), 0.0, 0, answers)
        records, _ = teachers.records(samples, self.tokenizer, 0.0, 0, 2 ** 31, form)

        def taught(number, record):
            sample, target = record
            return self.answer(number, sample, target, form)

        return encoded(records, taught)
