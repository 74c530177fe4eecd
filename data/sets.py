"""Published sets of pictures in classes, as torchvision's own dataset classes read them.

    splits, report_line = load("CIFAR10@DIR")   # splits["train"], ["val"], ["test"]: lists of Sample

DIR is torchvision's `root`. The published test split is `test`. A published validation split is
`val`; of a set without one the hash of the picture takes val out of the training split. Both keep
all their pictures; one of the training split that is also in one of them is dropped from train.

torchvision checks the files that it unpickles against its own checksums; nothing here goes around
that. Pictures are read when they are needed: one is a path, or a view into the array that
torchvision holds.
"""
import hashlib
import inspect
import os
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.images import Picture, check_names, divided, picture_notes, sample_of, words
from data.splits import pixel_hash
from model.runs.config import first_line, need


class Published(NamedTuple):
    """What torchvision does not say of a set."""
    train: str = "train"        # its training split
    val: str = ""               # its validation split, if it has one
    classes: tuple = ()         # names of its classes, where torchvision has none


DIGITS = tuple("0123456789")
SETS = {
    "CIFAR10": Published(),
    "CIFAR100": Published(),
    "DTD": Published(val="val"),
    "FGVCAircraft": Published(val="val"),
    "FashionMNIST": Published(),
    "Flowers102": Published(val="val"),
    "Food101": Published(),
    "KMNIST": Published(),
    "MNIST": Published(),
    "OxfordIIITPet": Published(train="trainval"),
    "STL10": Published(),
    "SVHN": Published(classes=DIGITS),
    "StanfordCars": Published(),
    "USPS": Published(classes=DIGITS),
}


def load(where, val_percent=20, download=False):
    """NAME@DIR -> ({"train": [Sample], "val": [Sample], "test": [Sample]}, a line on what was found).

    download: whether torchvision may fetch what DIR does not hold. Raises ValueError, one sentence,
    for another name, for what DIR lacks, and for a damaged set.
    """
    name, _, folder = where.partition("@")
    need(name in SETS and folder, "data", f"torchvision:{where}",
         f"be torchvision:NAME@DIR, with a NAME of {', '.join(SETS)}")
    published = SETS[name]
    parts = {published.train: "", "test": "test"}       # torchvision's split -> ours, "" for train and val
    if published.val:
        parts = {published.train: "train", published.val: "val", "test": "test"}
    pictures = []
    names = []                                          # of the classes, in torchvision's words
    for part, split in parts.items():
        dataset = opened(name, folder, part, download)
        names = published.classes or tuple(getattr(dataset, "classes", ()))
        need(names, "data", f"torchvision:{where}", "hold the names of its classes")
        for number, (image, label) in enumerate(labelled(dataset)):
            key = key_of(image, f"torchvision:{where}")
            pictures.append(Picture(key, split, answers(names[label])[0], f"{part}/{number}", image))
    aliases = dict(answers(text) for text in names)
    choices = tuple(sorted(aliases))
    check_names(choices)
    fate = defaultdict(Counter)
    placed, moved = divided(pictures, fate, val_percent, published=("val", "test"))
    splits = {"train": [], "val": [], "test": []}
    for picture in placed:
        splits[picture.split].append(sample_of(picture, choices, "torchvision", aliases[picture.label]))
    empty = [label for label in choices if not fate[label]["in train"]]
    need(not empty, "data", f"torchvision:{where}", f"have pictures of {empty[:5]} to train on")
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in splits.items())
    origin = "val as published" if published.val else f"val out of the published {published.train}"
    report = [f"torchvision: {name}, {len(placed)} pictures, {len(choices)} classes", counts, origin]
    return splits, "; ".join(report + picture_notes(placed, [], fate, moved))


def answers(text):
    """The name of a class -> (answer, its other names).

    >>> answers("apple_pie"), answers("0 - zero"), answers("T-shirt/top")
    (('apple pie', ()), ('0', ('zero',)), ('T shirt top', ()))
    """
    first, dash, other = text.replace("/", " ").partition(" - ")        # a source ends at its last "/"
    return words(first), ((words(other),) if dash else ())


def opened(name, folder, part, download):
    """A split of a set as torchvision's Dataset. Raises ValueError where it cannot be had."""
    from torchvision import datasets                    # takes a second that other sources need not wait
    make = getattr(datasets, name)
    accepted = inspect.signature(make).parameters
    options = {"split": part}
    if "train" in accepted:
        options = {"train": part != "test"}
    if "loader" in accepted:
        options["loader"] = str                         # a picture is then its path
    if download:
        options["download"] = True
    given = f"torchvision:{name}@{folder}"
    root = Path(os.path.expanduser(folder))
    try:
        with leaving_no_empty_folder(root):
            return make(str(root), **options)
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(f"--data={given} needs the package {package}: pip install {package}") from None
    except (RuntimeError, OSError) as error:
        if download:
            raise ValueError(f"--data={given} could not be downloaded: {first_line(error)}") from None
        raise ValueError(f"--data={given}: the folder holds no {name}, or a damaged one; expected its files as "
                         "torchvision keeps them, or --download") from None
    except Exception as error:                          # what is not guarded by a checksum may be anything
        raise ValueError(f"--data={given} cannot be read: {first_line(error)}") from None


@contextmanager
def leaving_no_empty_folder(root):
    """Takes folders that were made meanwhile away again, where an error leaves them without a file."""
    made = [path for path in (root, *root.parents) if not path.exists()]        # from the inside out
    try:
        yield
    except BaseException:
        if made:
            made = [*sorted(root.glob("**/"), reverse=True), *made]
        for path in made:
            with suppress(OSError):                     # not empty, or never made
                path.rmdir()
        raise


def labelled(dataset):
    """A Dataset -> its (picture as a Sample has it, number of its class), in order; decodes nothing."""
    if hasattr(dataset, "data"):
        numbers = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        return zip(as_rgb(np.asarray(dataset.data)), map(int, numbers))
    if hasattr(dataset, "_images"):                     # OxfordIIITPet, which takes no loader
        return zip(map(str, dataset._images), dataset._labels)
    return (dataset[number] for number in range(len(dataset)))


def as_rgb(data):
    """Pictures of a set, (n, H, W), (n, 3, H, W) or (n, H, W, 3) -> a view of (n, H, W, 3)."""
    if data.ndim == 3:
        return np.broadcast_to(data[..., None], (*data.shape, 3))
    if data.shape[1] == 3:
        return np.moveaxis(data, 1, 3)
    return data


def key_of(image, given):
    """Tells a picture from the others of its set: the hash of its pixels, of a file that of its bytes, since decoding
    a hundred thousand photographs would take minutes at every start."""
    if not isinstance(image, str):
        return pixel_hash(image)
    try:
        return hashlib.sha256(Path(image).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"--data={given}: picture {image!r} cannot be read: {error.strerror}") from None
