"""What answers to pictures in classes are worth without a language model, to be held beside those of one.

Each gives an answer for every sample that is asked, from the training samples that are shown; one
chunk of pictures is decoded at a time. Zero-shot CLIP is `data.zero_shot`.
"""
import numpy as np
import torch

from data.answers import commonest_answer
from data.sample import to_array, to_pixels

CHUNK = 256                                 # pictures at once
# Of the penalty, a share of the features' own variance; the first of equals is that of the shape probe.
RIDGES = (1e-2, 1e-3, 1e-1, 1e-4, 1.0)


def majority(shown, asked):
    """The commonest class of what is shown."""
    answer, _ = commonest_answer(shown)
    return [answer] * len(asked)


def nearest_pixels(shown, asked, side):
    """The class of the shown picture whose pixels are nearest, both cropped and resized to `side`; the first of
    equals."""
    tests = _pixels_of(asked, side)
    nearest = torch.full((len(asked),), torch.inf)
    place = torch.zeros(len(asked), dtype=torch.long)
    for first in range(0, len(shown), CHUNK):
        train = _centred(_pixels_of(shown[first:first + CHUNK], side))
        norm = train.square().sum(1)
        for begin in range(0, len(asked), CHUNK):
            some = slice(begin, begin + CHUNK)
            # |a - b|^2 without the |a|^2 of what is asked, the same for all that is shown
            distance, at = (norm - 2 * _centred(tests[some]) @ train.T).min(1)
            closer = distance < nearest[some]
            nearest[some] = torch.where(closer, distance, nearest[some])
            place[some] = torch.where(closer, at + first, place[some])
    return [shown[i].answer for i in place.tolist()]


def _pixels_of(samples, side):
    """n samples -> (n, 3 side^2) uint8."""
    return np.stack([to_array(sample.images[0], side).ravel() for sample in samples])


def _centred(pixels):
    return torch.from_numpy(pixels).float() / 255 - 0.5


def probed(shown, asked, features, pixels):
    """A linear read-out of the classes from an image tower's patch tokens, averaged over each picture.

    features(pixels (B, 3, S, S)) -> (B, N, D); pixels: arguments of `collate`, as the tower's pictures are made.
    """
    names = sorted({sample.answer for sample in shown})
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[sample.answer] for sample in shown])
    found = linear_probe(_features_of(shown, features, pixels), labels, _features_of(asked, features, pixels))
    return [names[i] for i in found.tolist()]


@torch.no_grad()
def _features_of(samples, features, pixels):
    """n samples -> (n, D) float32 on the CPU."""
    rows = []
    for first in range(0, len(samples), CHUNK):
        pictures = [sample.images[0] for sample in samples[first:first + CHUNK]]
        size, *rest = pixels["image_size"], pixels["fit"], pixels["mean"], pixels["std"]
        rows.append(features(to_pixels(pictures, size, *rest)).float().mean(1).cpu())
    return torch.cat(rows)


def linear_probe(x, labels, asked):
    """(n, D) features and (n,) numbers of classes, (m, D) features -> (m,) numbers of classes.

    Ridge regression on one-hot classes. The penalty is the one of RIDGES that reads every fifth picture best from the
    others; the first of equals, as where a class is shown once.
    """
    mean = x.mean(0)
    deviation = x.std(0, correction=0).clamp(min=1e-6)
    x = ((x - mean) / deviation).double()
    asked = ((asked - mean) / deviation).double()
    target = torch.nn.functional.one_hot(labels).double()
    held_out = torch.arange(len(x)) % 5 == 4
    best = RIDGES[0]
    if held_out.any():
        scores = {}
        for strength in RIDGES:
            read = _ridge(x[~held_out], target[~held_out], strength)(x[held_out])
            scores[strength] = (read == labels[held_out]).float().mean().item()
        best = max(scores, key=scores.get)
    return _ridge(x, target, best)(asked)


def _ridge(x, target, strength):
    """-> a function that reads (m, D) features: their (m,) numbers of classes."""
    mean = x.mean(0)
    middle = target.mean(0)
    centred = x - mean
    penalty = strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (target - middle))
    return lambda asked: ((asked - mean) @ weight + middle).argmax(1)
