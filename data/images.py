"""A folder of pictures, one sub-folder a class, as questions: what is shown in the picture?

    DIR/<class>/*.jpg                                   split by the hash of the pixels
    DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg   split as given
    DIR/hospital_b/<class>/*.jpg beside these two       a split of one's own, which is only evaluated

val may be called valid, validation or test, in upper or lower case: the first of these names that
is there is val. Each other folder beside train whose sub-folders are named like classes of train or
val is a split of its own name; what is no such folder is left out, and the report says so. A
picture stands on one side: one of train that is also in another split is dropped from train, and
one of val that is also in a split of one's own is dropped from val. A folder with nothing but one
folder of such folders in it is read as that one.

    splits, report_line = load("DIR")       # splits["train"], splits["val"]: lists of Sample
"""
import os
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from data.answers import alike, fault
from data.sample import Sample
from data.splits import check_name, pixel_hash, sides, split_of

QUESTION = "What is shown in the picture?"
SUFFIXES = set(".jpg .jpeg .jfif .png .gif .bmp .webp .avif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .tga .ico"
               .split())
VAL = ("val", "valid", "validation", "test")
LAYOUT = ("DIR/<class>/*.jpg, or DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg "
          f"(or {', '.join(VAL[1:])})")
DEEPEST = 8  # folders in folders that are looked through; a link to a folder above it has no end


class Layout(NamedTuple):
    """Where a folder keeps its pictures."""
    splits: dict        # split -> its folder; {"": folder} where the hash of the pixels decides
    left_out: dict      # folder beside the splits -> why it is none, "" where its name says it all


class ClassFolder(NamedTuple):
    split: str          # "" where the hash of the pixels decides
    label: str
    path: Path


class Picture(NamedTuple):
    key: str            # hash that tells it from other pictures
    split: str          # "" where that hash decides
    label: str
    name: str           # the id of its Sample
    image: object       # as a Sample has it: path or array


# ---------------------------------------------------------------- names and folders

def readable(name):
    """A file name as text that can be printed, stored and tokenised: bytes that are not UTF-8 are
    read as Latin-1."""
    raw = os.fsencode(name)
    try:
        # macOS splits accents off, Linux does not
        return unicodedata.normalize("NFC", raw.decode())
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def words(name):
    """The name of a class as text: "sea_gull" -> "sea gull"."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def class_name(folder):
    """The class that a folder's name stands for."""
    return words(readable(folder.name))


def listing(folder):
    """What is in a folder, sorted, without hidden files."""
    # __MACOSX holds the shadows (._cat.jpg) that a zip made on a Mac brings along.
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX")))


def folders_in(folder):
    return [entry for entry in listing(folder) if entry.is_dir()]


def is_picture(entry):
    return entry.suffix.lower() in SUFFIXES and not entry.is_dir()


def holds_only_folders(folder):
    """Whether there are folders in a folder and no pictures."""
    inside = listing(folder)
    if any(is_picture(entry) for entry in inside):      # first: it mostly ends at the first entry
        return False
    return any(entry.is_dir() for entry in inside)


def first_of(items, limit, separator=", "):
    """At most `limit` of the texts, with a sign that there are more."""
    shown = separator.join(items[:limit])
    return f"{shown}{separator}..." if len(items) > limit else shown


def listed(problems):
    """The first ten problems, and how many there are besides."""
    text = "; ".join(problems[:10])
    more = len(problems) - 10
    return f"{text}; and {more} more" if more > 0 else text


def unwrapped(root):
    """The folder with the classes, or with train and val, in it: `root`, or what folders around a
    single one wrap."""
    top = root
    for _ in range(DEEPEST):
        if not holds_only_folders(top):
            return top
        inside = folders_in(top)
        if len(inside) > 1 or not holds_only_folders(inside[0]):
            return top
        top = inside[0]
    raise ValueError(f"it holds a single folder, which holds a single folder, {DEEPEST} deep; "
                     f"expected {LAYOUT}")


# ---------------------------------------------------------------- the layout

def layout_of(top):
    """-> Layout of the folder with the classes, or with train and val, in it.

    Raises ValueError when there are folders called train and val and no classes below them.
    """
    inside = folders_in(top)
    named = {readable(folder.name).lower(): folder for folder in inside}  # sorted: lower case wins
    candidates = [named[name] for name in VAL if name in named]
    if "train" not in named or not candidates:
        return Layout({"": top}, {})
    val = candidates[0]
    for folder in candidates:
        if folders_in(folder):
            val = folder
            break
    splits = {"train": named["train"], "val": val}
    for folder in splits.values():
        if not folders_in(folder):
            raise ValueError(f"its folder {readable(folder.name)!r} holds no class folders; "
                             f"expected {LAYOUT}, or name a folder of class folders")
    known = set()
    for folder in splits.values():
        known |= {class_name(entry) for entry in folders_in(folder)}
    left_out = {}
    for folder in inside:
        if folder in splits.values():
            continue
        name = readable(folder.name)
        why = why_no_split(folder, named, known)
        if why is None:
            splits[name] = folder
        else:
            left_out[folder] = why
    return Layout(splits, left_out)


def why_no_split(folder, named, known):
    """Why a folder beside train and val is no split of one's own ("" where that needs no words), or
    None if it is one. named: lower-case name -> the folder of that name; known: the classes of
    train and val.
    """
    name = readable(folder.name)
    if named[name.lower()] != folder:               # "Train" beside "train"
        return ""
    labels = {class_name(entry) for entry in folders_in(folder)}
    if not labels:
        return ""
    unknown = sorted(labels - known)
    if unknown:
        return f"{unknown[0]!r} in it is no class of train or val"
    try:
        check_name(name)
    except ValueError as error:
        return str(error)
    return None


def check_names(choices):
    """Raises ValueError for classes that no answer could name, or that count as the same answer."""
    problems = []
    for label in choices:
        why = fault(label)
        if not label:
            problems.append("a class folder whose name is only '_', '-' or spaces names no class")
        elif why:
            problems.append(f"class {label!r} {why}")
    for same in alike(choices):
        problems.append(f"classes {' and '.join(map(repr, same[:5]))} count as the same answer")
    if problems:
        raise ValueError(f"{listed(problems)}; rename the folders (upper and lower case, full "
                         "stops at the end and how a number is written make no difference)")


def check_nesting(folders):
    """Raises ValueError when the class folders hold folders where pictures belong."""
    nested = [folder.path for folder in folders if holds_only_folders(folder.path)]
    if not nested:
        return
    for folder in folders:
        if any(is_picture(entry) for entry in listing(folder.path)):
            return
    example = f"{readable(nested[0].name)}/{readable(folders_in(nested[0])[0].name)}"
    raise ValueError(f"its folders hold folders, not pictures, as in {example!r}; expected {LAYOUT}, "
                     "so name one of the folders, or move the class folders up")


# ---------------------------------------------------------------- the pictures

def load(folder, val_percent=20):
    """The pictures of `folder` -> ({"train": [Sample], "val": [Sample], and every split of one's
    own}, a line that reports what was found).

    Raises ValueError, one sentence that names the folder, when it is not laid out as above, has
    classes that cannot be told apart, or a class without a picture in train and in val.
    """
    root = Path(os.path.expanduser(folder))
    where = f"folder {str(folder)!r}"
    if not str(folder) or not root.exists():
        raise ValueError(f"{where} does not exist; expected {LAYOUT}")
    if not root.is_dir():
        raise ValueError(f"{where} is a file; expected a folder, {LAYOUT}")
    try:
        top = unwrapped(root)
        layout = layout_of(top)
        folders = class_folders(layout)
        choices = tuple(sorted({folder.label for folder in folders}))
        check_names(choices)
        check_nesting(folders)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not choices:
        raise ValueError(f"{where} has no class sub-folders; expected {LAYOUT}")
    if len(choices) == 1:
        raise ValueError(f"{where} has one class only, {choices[0]!r}: nothing to tell apart; "
                         f"expected {LAYOUT}")
    fate = defaultdict(Counter)             # class -> what became of its files; the errors quote it
    pictures, unreadable = hashed(root, folders, fate)
    placed, moved = divided(pictures, fate, val_percent)
    check(where, choices, fate, layout)

    splits = {"train": [], "val": [], **{split: [] for split in layout.splits if split}}
    for picture in placed:
        splits[picture.split].append(sample_of(picture, choices, "images"))
    counts = ", ".join(f"{len(samples)} {split}" for split, samples in splits.items())
    report = [f"images: {len(placed)} pictures, {len(choices)} classes", counts]
    report += picture_notes(placed, unreadable, fate, moved)
    report += layout_notes(root, top, layout)
    return splits, "; ".join(report)


def sample_of(picture, choices, source, aliases=()):
    """The question about a Picture that stands in its split. aliases: other names of its class."""
    return Sample(
        id=picture.name,
        images=(picture.image,),
        question=QUESTION,
        answer=picture.label,
        caption=picture.label,
        aliases=aliases,
        choices=choices,
        split=picture.split,
        source=f"{source}/{picture.label}")


def class_folders(layout):
    """-> [ClassFolder] of all splits."""
    folders = []
    for split, above in layout.splits.items():
        for path in folders_in(above):
            folders.append(ClassFolder(split, class_name(path), path))
    return folders


def hashed(root, folders, fate):
    """[ClassFolder] -> ([Picture], names of the unreadable ones below `root`). What is no picture
    is counted in `fate`, by class."""
    pictures, unreadable = [], []
    for split, label, folder in folders:
        for entry in listing(folder):
            if entry.is_dir():
                fate[label]["sub-folders"] += 1
                continue
            if entry.suffix.lower() not in SUFFIXES:
                fate[label]["not pictures"] += 1
                continue
            name = readable(entry.relative_to(root).as_posix())
            try:
                pictures.append(Picture(pixel_hash(entry), split, label, name, str(entry)))
            except ValueError:
                unreadable.append(repr(name)[1:-1])
                fate[label]["unreadable"] += 1
    return pictures, unreadable


def divided(pictures, fate, val_percent, published=()):
    """[Picture] -> ([Picture], those that stay, each with its split; how many pictures the hash
    alone would have put elsewhere). Counts in `fate` what becomes of each, by class.

    published: splits that keep every picture, so that results on them stay comparable with those of
    others.
    """
    labels = defaultdict(set)               # hash -> its classes
    given = defaultdict(set)                # hash -> the splits that hold it
    for picture in pictures:
        labels[picture.key].add(picture.label)
        given[picture.key].add(picture.split)
    by_hash = {}
    undecided = {key: labels[key] for key, splits in given.items() if splits == {""}}
    if undecided:
        by_hash = split_by_hash(undecided, val_percent)
    placed = []
    for picture in pictures:
        counts = fate[picture.label]
        if picture.split in published:
            counts[f"in {picture.split}"] += 1
            placed.append(picture)
            continue
        if len(labels[picture.key]) > 1:    # either class may be the wrong one
            counts["also under another class"] += 1
            continue
        others = given[picture.key] - {picture.split}
        if picture.split in ("train", "") and others:
            counts[f"in train dropped, also in {first_split(others)}"] += 1
            continue
        if picture.split == "val" and others - {"train"}:
            counts[f"in val dropped, also in {first_split(others - {'train'})}"] += 1
            continue
        split = picture.split or by_hash[picture.key]
        counts[f"in {split}"] += 1
        placed.append(picture._replace(split=split))
    moved = sum(split != split_of(key, val_percent) for key, split in by_hash.items())
    return placed, moved


def first_split(splits):
    """val if it is among the splits, else the first by name."""
    return "val" if "val" in splits else min(splits)


def split_by_hash(labels, val_percent):
    """{hash: its classes} -> {hash: split}, class by class, of those that have one class."""
    keys = defaultdict(list)
    for key, classes in labels.items():
        if len(classes) == 1:
            keys[min(classes)].append(key)
    found = {}
    for of_class in keys.values():
        found |= sides(of_class, val_percent)
    return found


# ---------------------------------------------------------------- what is reported

def picture_notes(placed, unreadable, fate, moved):
    """[text] of at most one entry: what became of pictures that were not simply taken."""
    total = sum(fate.values(), Counter())
    copies = len(placed) - len({(picture.key, picture.split) for picture in placed})
    notes = []
    if copies:
        notes.append(f"{copies} duplicates kept together")
    if unreadable:
        notes.append(f"{len(unreadable)} unreadable skipped ({first_of(unreadable, 5)})")
    if total["also under another class"]:
        notes.append(f"{total['also under another class']} left out, the same picture under two classes")
    for what in sorted(total):
        split, dropped, other = what.partition(" dropped, also in ")
        if dropped:
            notes.append(f"{total[what]} dropped from {split.removeprefix('in ')}, also in {other}")
    if moved:
        notes.append(f"{moved} moved to the other split, so that each has every class")
    return [", ".join(notes)] if notes else []


def layout_notes(root, top, layout):
    """[text]: what the report says of folders with other names than DIR/train and DIR/val."""
    notes = []
    if top != root:
        notes.append(f"read from its folder {readable(top.relative_to(root).as_posix())!r}")
    val = layout.splits.get("val")
    if val and val.name.lower() != "val":
        notes.append(f"val is the folder {readable(val.name)!r}")
    if layout.left_out:
        names = []
        for folder, why in layout.left_out.items():
            name = repr(readable(folder.name))
            names.append(f"{name} ({why})" if why else name)
        notes.append(f"left out: {first_of(names, 5)}")
    return notes


def check(where, choices, fate, layout):
    """Raises ValueError unless each class has a picture in train and in val; lists all that lack
    one."""
    unusable, missing = [], []
    lacking = set()
    for label in choices:
        counts = fate[label]
        story = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()) if count)
        lacks = [split for split in ("train", "val") if not counts[f"in {split}"]]
        if len(lacks) == 2:
            unusable.append(f"class {label!r} is left with no usable picture ({story or 'empty'})")
        elif lacks:
            missing.append(f"{lacks[0]} has no picture of class {label!r} ({story or 'empty'})")
            lacking.add(lacks[0])
    advice = []
    if unusable:
        advice.append(f"expected {LAYOUT}")
    if missing and "" in layout.splits:
        advice.append("add such pictures, or make train/ and val/ folders yourself")
    elif missing:
        for split in sorted(lacking):
            advice.append(f"add such pictures to {readable(layout.splits[split].name)}/")
    if advice:
        raise ValueError(f"{where}: {listed(unusable + missing)}; {'; '.join(advice)}")
