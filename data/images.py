"""A folder of pictures, one sub-folder a class, as questions: what is shown in the picture?

    DIR/<class>/*.jpg                                   split by the hash of the pixels
    DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg   split as given; a train picture that is also in val is dropped

val may be called valid, validation or test (the first of them that is there; the others are left out), in upper or
lower case. A folder with nothing but one folder of such folders in it is read as that one.

    splits, report_line = load("DIR")       # splits["train"], splits["val"]: lists of Sample
"""
import os
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from data.answers import alike, fault
from data.sample import Sample
from data.splits import pixel_hash, sides, split_of

QUESTION = "What is shown in the picture?"
SUFFIXES = set(".jpg .jpeg .jfif .png .gif .bmp .webp .avif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .tga .ico".split())
VAL = ("val", "valid", "validation", "test")
LAYOUT = f"DIR/<class>/*.jpg, or DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg (or {', '.join(VAL[1:])})"
DEEPEST = 8         # folders in folders that are looked through; a link to a folder above it has no end


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


def folders_in(folder):
    return [entry for entry in listing(folder) if entry.is_dir()]


def is_picture(entry):
    return entry.suffix.lower() in SUFFIXES and not entry.is_dir()


def holds_folders_alone(folder):
    inside = listing(folder)
    if any(is_picture(entry) for entry in inside):      # first: it mostly ends at the first entry
        return False
    return any(entry.is_dir() for entry in inside)


def listed(problems):
    """The first ten problems and how many there are besides."""
    more = len(problems) - 10
    return "; ".join(problems[:10]) + (f"; and {more} more" if more > 0 else "")


def unwrapped(root):
    """The folder with the classes, or with train and val, in it: `root`, or what folders around a single one wrap."""
    top = root
    for _ in range(DEEPEST):
        if not holds_folders_alone(top):
            return top
        inside = folders_in(top)
        if len(inside) > 1 or not holds_folders_alone(inside[0]):
            return top
        top = inside[0]
    raise ValueError(f"it holds a single folder, which holds a single folder, {DEEPEST} deep; expected {LAYOUT}")


def given_splits(top):
    """-> ({"train": folder, "val": folder}, the other folders), or ({}, []) when no folder has a split's name.

    Raises ValueError when there are such names and no classes below them.
    """
    inside = folders_in(top)
    named = {readable(folder.name).lower(): folder for folder in inside}        # sorted: lower case wins
    val = [named[name] for name in VAL if name in named]
    if "train" not in named or not val:
        return {}, []
    with_classes = [folder for folder in val if folders_in(folder)]
    splits = {"train": named["train"], "val": [*with_classes, *val][0]}
    for folder in splits.values():
        if not folders_in(folder):
            raise ValueError(f"its folder {readable(folder.name)!r} holds no class folders; expected {LAYOUT}, or "
                             "name a folder of class folders")
    return splits, [folder for folder in inside if folder not in splits.values()]


def check_names(choices):
    """Raises ValueError for classes that no answer could name, or that count as the same answer."""
    problems = []
    for label in choices:
        why = fault(label)
        if not label:
            problems.append("a class folder whose name is only '_', '-' or spaces names no class")
        elif why:
            problems.append(f"class {label!r} {why}")
    problems += [f"classes {' and '.join(map(repr, same[:5]))} count as the same answer" for same in alike(choices)]
    if problems:
        raise ValueError(f"{listed(problems)}; rename the folders (upper and lower case, full stops at the end and how "
                         "a number is written make no difference)")


def check_nesting(folders):
    """Raises ValueError when the class folders hold folders where pictures belong."""
    nested = [path for _, _, path in folders if holds_folders_alone(path)]
    if nested and not any(is_picture(entry) for _, _, path in folders for entry in listing(path)):
        shown = readable(nested[0].name), readable(folders_in(nested[0])[0].name)
        raise ValueError(f"its folders hold folders, not pictures, as in {'/'.join(shown)!r}; expected {LAYOUT}, so "
                         "name one of the folders, or move the class folders up")


def load(folder, val_percent=20):
    """The pictures of `folder` -> ({"train": [Sample], "val": [Sample]}, a line that says what was found).

    Raises ValueError, one sentence that names the folder, when it is not laid out as above, has classes that cannot be
    told apart, or a class without a picture in train and in val.
    """
    root = Path(os.path.expanduser(folder))
    where = f"folder {str(folder)!r}"
    if not str(folder) or not root.exists():
        raise ValueError(f"{where} does not exist; expected {LAYOUT}")
    if not root.is_dir():
        raise ValueError(f"{where} is a file; expected a folder, {LAYOUT}")
    try:
        top = unwrapped(root)
        given, others = given_splits(top)
        tops = given or {"": top}
        folders = [(split, class_name(path), path) for split, above in tops.items() for path in folders_in(above)]
        choices = tuple(sorted({label for _, label, _ in folders}))
        check_names(choices)
        check_nesting(folders)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not choices:
        raise ValueError(f"{where} has no class sub-folders; expected {LAYOUT}")
    if len(choices) == 1:
        raise ValueError(f"{where} has one class only, {choices[0]!r}: nothing to tell apart; expected {LAYOUT}")

    fate = defaultdict(Counter)             # class -> what became of its files; the errors below quote it
    pictures, unreadable = hashed(root, folders, fate)
    labels = defaultdict(set)               # pixel hash -> its classes
    for key, _, label, _ in pictures:
        labels[key].add(label)
    side = {} if given else by_hash(labels, val_percent)
    in_val = {key for key, split, _, _ in pictures if split == "val"}
    splits, kept, copies = {"train": [], "val": []}, set(), 0
    for key, split, label, path in pictures:
        if len(labels[key]) > 1:            # either class may be the wrong one
            fate[label]["also under another class"] += 1
            continue
        if split == "train" and key in in_val:
            fate[label]["in train dropped, also in val"] += 1
            continue
        split = split or side[key]
        fate[label][f"in {split}"] += 1
        copies += key in kept
        kept.add(key)
        splits[split].append(Sample(
            id=readable(path.relative_to(root).as_posix()), images=(str(path),), question=QUESTION, answer=label,
            caption=label, choices=choices, split=split, source=f"images/{label}"))

    check(where, choices, fate, given)
    total = sum(fate.values(), Counter())
    moved = sum(split != split_of(key, val_percent) for key, split in side.items())
    notes = [(copies, "duplicates kept together"),
             (len(unreadable), f"unreadable skipped ({', '.join(unreadable[:5])}{', ...' * (len(unreadable) > 5)})"),
             (total["also under another class"], "left out, the same picture under two classes"),
             (total["in train dropped, also in val"], "dropped from train, also in val"),
             (moved, "moved to the other split, so that each has every class")]
    line = (f"images: {sum(map(len, splits.values()))} pictures, {len(choices)} classes; "
            f"{len(splits['train'])} train, {len(splits['val'])} val")
    said = [", ".join(f"{count} {what}" for count, what in notes if count), *layout_notes(root, top, given, others)]
    return splits, "; ".join(filter(None, [line, *said]))


def hashed(root, folders, fate):
    """(split, class, folder) triples -> ([(pixel hash, split, class, path)], names of the unreadable below `root`).

    Adds to the counts of `fate`, by class, what is passed over.
    """
    pictures, unreadable = [], []
    for split, label, folder in folders:
        for entry in listing(folder):
            if entry.is_dir():
                fate[label]["sub-folders"] += 1
                continue
            if entry.suffix.lower() not in SUFFIXES:
                fate[label]["not pictures"] += 1
                continue
            try:
                pictures.append((pixel_hash(entry), split, label, entry))
            except ValueError:
                unreadable.append(repr(readable(entry.relative_to(root).as_posix()))[1:-1])
                fate[label]["unreadable"] += 1
    return pictures, unreadable


def by_hash(labels, val_percent):
    """{pixel hash: its classes} -> {pixel hash: split}, class by class, of those that have one class."""
    keys = defaultdict(list)
    for key, classes in labels.items():
        if len(classes) == 1:
            keys[next(iter(classes))].append(key)
    return {key: split for own in keys.values() for key, split in sides(own, val_percent).items()}


def layout_notes(root, top, given, others):
    """What the report says of folders with other names than DIR/train and DIR/val."""
    notes = []
    if top != root:
        notes.append(f"read from its folder {readable(top.relative_to(root).as_posix())!r}")
    if given and given["val"].name.lower() != "val":
        notes.append(f"val is the folder {readable(given['val'].name)!r}")
    if others:
        names = [repr(readable(folder.name)) for folder in others]
        notes.append(f"left out: {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
    return notes


def check(where, choices, fate, given):
    """Raise ValueError unless each class has a picture in train and in val; all classes that lack one are listed."""
    unusable, missing, lacking = [], [], set()
    for label in choices:
        story = ", ".join(f"{count} {what}" for what, count in sorted(fate[label].items()) if count) or "empty"
        lacks = [split for split in ("train", "val") if not fate[label][f"in {split}"]]
        if len(lacks) == 2:
            unusable.append(f"class {label!r} is left with no usable picture ({story})")
        elif lacks:
            missing.append(f"{lacks[0]} has no picture of class {label!r} ({story})")
            lacking.add(lacks[0])
    advice = [f"expected {LAYOUT}"] if unusable else []
    if missing and given:
        advice += [f"add such pictures to {readable(given[split].name)}/" for split in sorted(lacking)]
    elif missing:
        advice.append("add such pictures, or make train/ and val/ folders yourself")
    if advice:
        raise ValueError(f"{where}: {listed(unusable + missing)}; {'; '.join(advice)}")
