"""Which split a sample falls in, decided by the pixels of its picture, so that the same picture
never stands on two sides.

train is what trains, val is held out; any other name is a split of one's own, which is only
evaluated.
"""
import hashlib
import os
import re
from collections import defaultdict
from dataclasses import replace

import numpy as np

from data import scenes
from data.answers import check_sample
from data.sample import bands, read_image
from model.runs.config import need

NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")


def pixel_hash(source):
    """sha256 over the size and the upright RGB pixels, as hexadecimal digits; a new name or a
    lossless re-save does not change it. Raises ValueError for what is no picture."""
    image = read_image(source)
    digest = hashlib.sha256(f"{image.width}x{image.height} ".encode())
    for _, band in bands(image):            # the bytes of a whole picture would double its memory
        digest.update(band.tobytes())
    return digest.hexdigest()


def mixed(samples):
    """The samples in an order that their ids decide: the first n of them, for any n, are a fair
    sample of all."""
    def place(sample):
        return hashlib.sha256(sample.id.encode(errors="surrogatepass")).digest()
    return sorted(samples, key=place)


def few_shots(samples, count, seed):
    """`count` samples of each answer, drawn by the seed, in their order; those of a smaller count are among those of a
    larger one. Raises ValueError when an answer has fewer."""
    places = defaultdict(list)
    for place, sample in enumerate(samples):
        places[sample.answer].append(place)
    rarest = min(sorted(places), key=lambda answer: len(places[answer]))
    need(count <= len(places[rarest]), "shots", count,
         f"be at most {len(places[rarest])}, the training pictures of class {rarest!r}")
    rng = np.random.default_rng(seed)
    chosen = []
    for answer in sorted(places):
        chosen += rng.permutation(places[answer])[:count].tolist()
    return [samples[place] for place in sorted(chosen)]


def split_of(key, val_percent):
    """'val' for `val_percent` in a hundred hashes, 'train' for the others; adding pictures moves no
    earlier one."""
    if not 1 <= val_percent <= 99:
        raise ValueError(f"val_percent {val_percent} must be between 1 and 99: both splits need pictures")
    return "val" if int(key, 16) % 100 < val_percent else "train"


def sides(keys, val_percent):
    """{hash: split} of the pictures of one class, by `split_of`; but of two or more, each split has
    at least one.

    A split that would have none is given the hash that the nearest other `val_percent` would move
    there, so that a larger one still only adds to val.
    """
    found = {key: split_of(key, val_percent) for key in keys}
    if len(found) > 1 and len(set(found.values())) == 1:
        order = sorted(found, key=lambda key: (int(key, 16) % 100, key))
        if found[order[0]] == "train":
            found[order[0]] = "val"
        else:
            found[order[-1]] = "train"
    return found


def check_name(split):
    """Raises ValueError unless a split of one's own can be called so."""
    if not NAME.fullmatch(split):
        raise ValueError(f"a split's name must be 1 to 40 letters, digits, _ or -, not {split!r}")
    if split.lower() in ("train", "val") and split not in ("train", "val"):
        raise ValueError(f"the split {split!r} must be written {split.lower()!r}")
    if split in scenes.SPLITS:      # tables and pictures of results know those by name
        raise ValueError(f"the split {split!r} must have another name, which no split of drawn scenes "
                         f"has ({', '.join(scenes.SPLITS)})")


class Division:
    """Takes the samples of a source one after the other and puts each into its split.

        division = Division(val_percent=20)
        division.put(sample, "line 7")
        division.check("line")
        division.splits             # {"train": [..], "val": [..]} and a list for every other split

    A sample that names its split goes there; the hash of its first picture's pixels decides for the
    others (that of its question where there is no picture). So all samples about one picture fall
    together, and one that is sent elsewhere is an error.
    """

    def __init__(self, val_percent):
        self.val_percent = val_percent
        self.splits = {"train": [], "val": []}
        self.hashes = {}            # path or bytes -> hash
        self.first = {}             # hash -> (split, place) of the first sample about that picture

    def put(self, sample, place):
        """Adds `sample`; place: what errors call the record it came from, such as "line 7".

        Raises ValueError for what is no picture, for a name that no split can have, and for a
        picture that stands in another split already.
        """
        keys = [self.hash(picture) for picture in sample.images]
        if not keys:
            keys = [hashlib.sha256(sample.question.encode()).hexdigest()]
        split = sample.split or split_of(keys[0], self.val_percent)
        check_name(split)
        for key in keys:
            earlier, earlier_place = self.first.setdefault(key, (split, place))
            if split != earlier:
                raise ValueError(f"it shows the same picture as {earlier_place} but falls in "
                                 f"{split}, not in {earlier}; give both the same split")
        self.splits.setdefault(split, []).append(replace(sample, split=split))

    def hash(self, picture):
        """`pixel_hash`, of a file or of bytes only once: many samples ask about one picture."""
        if isinstance(picture, np.ndarray):
            return pixel_hash(picture)
        if picture not in self.hashes:
            self.hashes[picture] = pixel_hash(picture)
        return self.hashes[picture]

    def check(self, what):
        """Raises ValueError when train or val is empty; what: the name of a record, such as
        "line"."""
        for split in ("train", "val"):
            if not self.splits[split]:
                raise ValueError(f"no {what} falls in {split} (of {self.count} {what}s about "
                                 f"{len(self.first)} pictures); add pictures, or give {what}s a "
                                 '"split"')

    @property
    def count(self):
        return sum(len(samples) for samples in self.splits.values())

    def counts(self):
        """The sizes of the splits as text, train and val first: "8 train, 2 val, 5 hospital_b"."""
        return ", ".join(f"{len(samples)} {split}" for split, samples in self.splits.items())


def divide(samples_of, where, val_percent=20):
    """A source that yields its samples one after the other -> (splits, a line on what was found).

    samples_of(where): an iterator of Sample. Raises ValueError naming the row of a sample that could not be asked or
    judged, or whose picture cannot be read or stands in another split already.
    """
    division = Division(val_percent)
    for number, sample in enumerate(samples_of(os.path.expanduser(where)), 1):
        try:
            check_sample(sample)
            division.put(sample, f"row {number}")
        except ValueError as error:
            raise ValueError(f"{where!r}, row {number}: {error}") from None
    division.check("row")
    return division.splits, f"{division.count} rows about {len(division.first)} pictures; {division.counts()}"
