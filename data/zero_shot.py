"""Zero-shot CLIP (arXiv 2103.00020, section 3.1): the answers whose texts lie nearest to a picture.

Two users: a teacher of real pictures weighs the nearest answers in its chains (`data/teachers.py`),
and the baseline "zero-shot CLIP" takes the nearest one. Which CLIP that is, `zero_shot` in
`eval.py` decides: the one that the run trained, or that of --clip with OpenAI's words.
"""
from dataclasses import dataclass
from typing import Callable

import torch

from data.sample import collate, to_pixels

PICTURES = 64               # encoded at once
TEXTS = 256


@dataclass(frozen=True)
class ZeroShot:
    """A CLIP that names what it sees.

    clip: both towers, with config.image_size, .mean and .std, logit_scale, whose device and dtype
    are theirs, encode_image(pixels) -> (B, E) and encode_text(ids, length) -> (B, E), unit vectors.
    read: an answer -> the ids of the text that stands for it.
    """
    clip: object
    read: Callable

    @torch.no_grad()
    def nearest(self, samples, answers, count):
        """For each sample, by its first picture, the `count` nearest of `answers`, best first.

        Pictures are prepared as transformers prepares them; open_clip's middle square may lie a
        pixel beside theirs.
        """
        config = self.clip.config
        scale = self.clip.logit_scale
        texts = torch.cat([self._texts(answers[first:first + TEXTS]) for first in range(0, len(answers), TEXTS)])
        nearest = []
        for first in range(0, len(samples), PICTURES):
            pictures = [sample.images[0] for sample in samples[first:first + PICTURES]]
            pixels = to_pixels(pictures, config.image_size, mean=config.mean, std=config.std)
            embeddings = self.clip.encode_image(pixels.to(scale.device, scale.dtype))   # (B, E)
            similarity = embeddings @ texts.T                                           # (B, answers)
            for places in similarity.topk(min(count, len(answers))).indices.tolist():
                nearest.append([answers[place] for place in places])
        return nearest

    def _texts(self, answers):
        """n answers -> unit vectors (n, E)."""
        rows = []
        for answer in answers:
            ids = self.read(answer)
            rows.append((ids, [0] * len(ids), ()))
        batch = collate(rows, 0, image_size=1).to(self.clip.logit_scale.device)
        return self.clip.encode_text(batch.ids, batch.length)


def as_captions(tokenizer, text_length):
    """`read` of a CLIP that a run trained: an answer as stage clip reads captions, at most
    `text_length` tokens."""
    def read(answer):
        return tokenizer.encode(" " + answer)[:text_length - 1] + [tokenizer.eos_id]
    return read
