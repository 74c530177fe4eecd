"""A folder of pictures, one sub-folder a class, as questions: what is shown in the picture?

    DIR/<class>/*.jpg                                   split by the hash of the pixels
    DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg   split as given; a train picture that is also in val is dropped

    splits, report_line = load("DIR")       # splits["train"], splits["val"]: lists of Sample
"""
import os
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from data.sample import Sample
from data.splits import pixel_hash, split_of

QUESTION = "What is shown in the picture?"
SUFFIXES = set(".jpg .jpeg .jfif .png .gif .bmp .webp .avif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .tga .ico".split())
LAYOUT = "DIR/<class>/*.jpg, or DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg"


def readable(name):
    """A file name as text that can be printed, stored and tokenised: bytes that are not UTF-8 are read as Latin-1."""
    raw = os.fsencode(name)
    try:
        return unicodedata.normalize("NFC", raw.decode())       # macOS splits accents off, Linux does not
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def class_name(folder):
    return " ".join(readable(folder.name).replace("_", " ").replace("-", " ").split())


def listing(folder):
    # __MACOSX holds the shadows (._cat.jpg) that a zip made on a Mac brings along.
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX")))


def load(folder, val_percent=20):
    """The pictures of `folder` -> ({"train": [Sample], "val": [Sample]}, a line that says what was found)."""
    root = Path(os.path.expanduser(folder))
    where = f"folder {str(folder)!r}"
    if not str(folder) or not root.exists():
        raise ValueError(f"{where} does not exist; expected {LAYOUT}")
    if not root.is_dir():
        raise ValueError(f"{where} is a file; expected a folder, {LAYOUT}")
    given = (root / "train").is_dir() and (root / "val").is_dir()
    tops = {"train": root / "train", "val": root / "val"} if given else {"": root}
    folders = [(split, class_name(path), path) for split, top in tops.items() for path in listing(top) if path.is_dir()]
    choices = tuple(sorted({label for _, label, _ in folders}))
    if not choices:
        raise ValueError(f"{where} has no class sub-folders; expected {LAYOUT}")
    if "" in choices:
        raise ValueError(f"{where}: a class folder whose name is only '_', '-' or spaces names no class; rename it")
    if len({label.lower() for label in choices}) < len(choices):       # an answer is compared in lower case
        raise ValueError(f"{where}: classes that differ only in upper and lower case, {choices}; rename one folder")
    if len(choices) == 1:
        raise ValueError(f"{where} has one class only, {choices[0]!r}: nothing to tell apart; expected {LAYOUT}")

    pictures, unreadable = [], []
    fate = defaultdict(Counter)             # class -> what became of its files; the errors below quote it
    for split, label, path in folders:
        for entry in listing(path):
            if entry.is_dir() or entry.suffix.lower() not in SUFFIXES:
                fate[label]["sub-folders" if entry.is_dir() else "not pictures"] += 1
                continue
            try:
                pictures.append((pixel_hash(entry), split, label, entry))
            except ValueError:
                unreadable.append(repr(readable(entry.relative_to(root).as_posix()))[1:-1])
                fate[label]["unreadable"] += 1

    labels = defaultdict(set)               # pixel hash -> its classes
    for key, _, label, _ in pictures:
        labels[key].add(label)
    in_val = {key for key, split, _, _ in pictures if split == "val"}
    splits, kept, copies = {"train": [], "val": []}, set(), 0
    for key, split, label, path in pictures:
        if len(labels[key]) > 1:            # either class may be the wrong one
            fate[label]["also under another class"] += 1
            continue
        if split == "train" and key in in_val:
            fate[label]["in train dropped, also in val"] += 1
            continue
        split = split or split_of(key, val_percent)
        fate[label][f"in {split}"] += 1
        copies += key in kept
        kept.add(key)
        splits[split].append(Sample(
            id=readable(path.relative_to(root).as_posix()), images=(str(path),), question=QUESTION, answer=label,
            caption=label, choices=choices, split=split, source=f"images/{label}"))

    check(where, choices, fate, given)
    total = sum(fate.values(), Counter())
    notes = [(copies, "duplicates kept together"),
             (len(unreadable), f"unreadable skipped ({', '.join(unreadable[:5])}{', ...' * (len(unreadable) > 5)})"),
             (total["also under another class"], "left out, the same picture under two classes"),
             (total["in train dropped, also in val"], "dropped from train, also in val")]
    line = (f"images: {sum(map(len, splits.values()))} pictures, {len(choices)} classes; "
            f"{len(splits['train'])} train, {len(splits['val'])} val")
    said = ", ".join(f"{count} {what}" for count, what in notes if count)
    return splits, f"{line}; {said}" if said else line


def check(where, choices, fate, given):
    """Raise ValueError unless each class has a picture in train and in val."""
    for split in ("train", "val"):
        for label in choices:
            if fate[label][f"in {split}"]:
                continue
            story = ", ".join(f"{count} {what}" for what, count in sorted(fate[label].items()) if count) or "empty"
            if not fate[label]["in train"] + fate[label]["in val"]:
                raise ValueError(f"{where}: class {label!r} is left with no usable picture ({story}); "
                                 f"expected {LAYOUT}")
            raise ValueError(f"{where}: {split} has no picture of class {label!r} ({story}); add pictures of it"
                             + (f" to {split}/" if given else ", or make train/ and val/ folders yourself"))
