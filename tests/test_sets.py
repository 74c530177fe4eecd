"""Published sets, in the formats of their own files: what `data.sets` and --shots make of torchvision's classes."""
import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from data import sets
from data.sample import read_image, to_array
from data.supply import DataOptions, Supply
from data.teachers import TeacherOptions

ROOT = Path(sets.__file__).parents[1]
COLOURS = ("aquamarine", "beige", "coral")


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return md5(path)


def cifar10(root, patch, each=6, labels=COLOURS):
    """A CIFAR-10 of five training batches and a test batch of `each` pictures; its checksums take the place of the
    published ones."""
    folder = root / "cifar-10-batches-py"
    sums = []
    for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        batch = {"data": noise(seed, each, 3072), "labels": [number % len(labels) for number in range(each)]}
        sums.append([name, dump(folder / name, batch)])
    meta = dict(datasets.CIFAR10.meta, md5=dump(folder / "batches.meta", {"label_names": list(labels)}))
    patch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    patch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    patch.setattr(datasets.CIFAR10, "meta", meta)
    return f"CIFAR10@{root}"


def mnist(root, patch):
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    for name, count, seed in (("train", 40, 0), ("t10k", 20, 1)):
        pixels = noise(seed, count, 28, 28)
        labels = bytes(number % 10 for number in range(count))
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    return f"MNIST@{root}"


def flowers102(root, patch):
    """Ids 1, 2, .. are of classes 1, 2, .. in turn, 102 in each split."""
    savemat = pytest.importorskip("scipy.io", reason="torchvision reads this set's labels by scipy").savemat
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 307):
        Image.fromarray(noise(number, 9, 12, 3)).save(folder / f"jpg/image_{number:05}.jpg")
    ids = np.arange(1, 307)
    savemat(folder / "imagelabels.mat", {"labels": (ids - 1) % 102 + 1})
    savemat(folder / "setid.mat", {"trnid": ids[:102], "valid": ids[102:204], "tstid": ids[204:]})
    files = dict(datasets.Flowers102._file_dict)
    for kind in ("label", "setid"):
        files[kind] = (files[kind][0], md5(folder / files[kind][0]))
    patch.setattr(datasets.Flowers102, "_file_dict", files)
    return f"Flowers102@{root}"


def pets(root, patch):
    folder = root / "oxford-iiit-pet"
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    for split, count, start in (("trainval", 6, 0), ("test", 3, 6)):
        lines = []
        for number in range(start, start + count):
            pet = ("Abyssinian", "saint_bernard")[number % 2]
            Image.fromarray(noise(number, 10, 8, 3)).save(folder / f"images/{pet}_{number}.jpg")
            lines.append(f"{pet}_{number} {number % 2 + 1} {number % 2 + 1} 1\n")
        (folder / f"annotations/{split}.txt").write_text("".join(lines))
    return f"OxfordIIITPet@{root}"


# Set: its classes as answers, pictures of train and val together, of test.
FAKES = {cifar10: (COLOURS, 30, 6), mnist: (tuple("0123456789"), 40, 20), pets: (("Abyssinian", "Saint Bernard"), 6, 3)}


@pytest.mark.parametrize("fake", FAKES)
def test_a_published_set_keeps_its_test_split_and_gives_val_from_its_training_split(tmp_path, monkeypatch, fake):
    classes, training, testing = FAKES[fake]
    where = fake(tmp_path, monkeypatch)
    splits, report = sets.load(where, 30)
    assert list(splits) == ["train", "val", "test"]
    assert len(splits["train"]) + len(splits["val"]) == training and len(splits["test"]) == testing
    name = where.partition("@")[0]
    assert report.startswith(f"torchvision: {name}, {training + testing} pictures, {len(classes)} classes; ")
    for split, samples in splits.items():
        assert {sample.answer for sample in samples} == {*classes}, split
        for sample in samples:
            assert (sample.question, sample.caption, sample.choices, sample.split, sample.source) == (
                "What is shown in the picture?", sample.answer, classes, split, f"torchvision/{sample.answer}")
    part = sets.SETS[name].train
    assert all(sample.id.startswith(f"{part}/") for sample in splits["train"] + splits["val"])

    # The pixels and labels are those that torchvision itself gives for that place of that split.
    for given, samples in ((part, splits["train"] + splits["val"]), ("test", splits["test"])):
        options = {"train": given != "test"} if fake in (cifar10, mnist) else {"split": given}
        theirs = getattr(datasets, name)(str(tmp_path), **options)
        for sample in samples:
            image, label = theirs[int(sample.id.rpartition("/")[2])]
            assert read_image(sample.images[0]).tobytes() == image.convert("RGB").tobytes()
            assert theirs.classes[label].replace(" - ", " ").split()[0] == sample.answer.split()[0]
    again, _ = sets.load(where, 30)
    assert [sample.id for sample in again["val"]] == [sample.id for sample in splits["val"]]


def test_flowers_has_a_published_validation_split_of_its_own(tmp_path, monkeypatch):
    splits, report = sets.load(flowers102(tmp_path, monkeypatch))
    assert [len(samples) for samples in splits.values()] == [102, 102, 102] and report.endswith("; val as published")
    sample = splits["val"][1]
    assert (sample.answer, sample.id) == ("hard leaved pocket orchid", "val/1")
    assert sample.images == (str(tmp_path / "flowers-102/jpg/image_00104.jpg"),)


def test_a_digit_may_be_called_by_its_word(tmp_path, monkeypatch):
    splits, _ = sets.load(mnist(tmp_path, monkeypatch))
    assert {(sample.answer, sample.aliases) for sample in splits["test"]} >= {("0", ("zero",)), ("9", ("nine",))}


def test_a_training_picture_that_is_also_tested_is_dropped_and_the_test_split_stays_whole(tmp_path, monkeypatch):
    where = pets(tmp_path, monkeypatch)
    pictures = tmp_path / "oxford-iiit-pet/images"
    (pictures / "Abyssinian_0.jpg").write_bytes((pictures / "Abyssinian_6.jpg").read_bytes())
    (pictures / "saint_bernard_1.jpg").write_bytes((pictures / "Abyssinian_8.jpg").read_bytes())     # under two classes
    splits, report = sets.load(where, 50)
    assert len(splits["train"]) + len(splits["val"]) == 4 and len(splits["test"]) == 3
    assert "1 dropped from train, also in test" in report and "1 left out, the same picture under two classes" in report


# ---------------------------------------------------------------- what is not there

def test_a_set_that_the_folder_lacks_is_one_sentence_that_names_download_and_nothing_is_fetched(tmp_path, monkeypatch):
    def fetch(*_):
        raise AssertionError("fetched without --download")
    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    with pytest.raises(ValueError, match=f"^--data=torchvision:CIFAR10@{tmp_path}: the folder holds no CIFAR10, or a "
                                         "damaged one; expected its files as torchvision keeps them, or --download$"):
        sets.load(f"CIFAR10@{tmp_path}")


def test_a_package_that_a_set_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "train_32x32.mat").write_bytes(b"any")
    monkeypatch.setitem(datasets.SVHN.split_list, "train", ["", "train_32x32.mat", md5(tmp_path / "train_32x32.mat")])
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match=f"^--data=torchvision:SVHN@{tmp_path} needs the package scipy: pip inst"):
        sets.load(f"SVHN@{tmp_path}")


def test_download_lets_torchvision_fetch_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda dataset: cifar10(Path(dataset.root), monkeypatch))
    splits, _ = sets.load(f"CIFAR10@{tmp_path}", download=True)
    assert len(splits["test"]) == 6


def test_a_download_that_fails_is_one_sentence_with_its_reason(tmp_path, monkeypatch):
    def fetch(_):
        raise OSError("<urlopen error no route>")
    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    with pytest.raises(ValueError, match="could not be downloaded: <urlopen error no route>$"):
        sets.load(f"CIFAR10@{tmp_path}", download=True)


def test_a_download_that_fails_leaves_no_empty_folder_but_what_was_there_and_what_was_fetched(tmp_path, monkeypatch):
    def fetch(dataset):
        Path(dataset.root, "raw").mkdir(parents=True)
        raise OSError("no route")
    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    with pytest.raises(ValueError, match="could not be downloaded: no route$"):
        sets.load(f"CIFAR10@{tmp_path / 'new' / 'sets'}", download=True)
    assert not (tmp_path / "new").exists() and tmp_path.exists()
    (tmp_path / "mine" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="could not be downloaded: no route$"):
        sets.load(f"CIFAR10@{tmp_path / 'mine'}", download=True)
    assert (tmp_path / "mine" / "empty").exists()

    def break_off(dataset):
        Path(dataset.root).mkdir()
        Path(dataset.root, "cifar-10-python.tar.gz").write_bytes(b"half")
        raise OSError("no route")
    monkeypatch.setattr(datasets.CIFAR10, "download", break_off)
    with pytest.raises(ValueError, match="could not be downloaded: no route$"):
        sets.load(f"CIFAR10@{tmp_path / 'half'}", download=True)
    assert (tmp_path / "half" / "cifar-10-python.tar.gz").exists()


def test_a_pickle_with_another_checksum_is_not_unpickled(tmp_path, monkeypatch):
    where = cifar10(tmp_path, monkeypatch)

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")
    dump(tmp_path / "cifar-10-batches-py/data_batch_1", Trap())
    with pytest.raises(ValueError, match="the folder holds no CIFAR10, or a damaged one"):
        sets.load(where)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("where", ["CIFAR10", "CIFAR10@", "cifar10@x", "@x", "VOCDetection@x"])
def test_a_set_that_is_not_known_is_one_sentence_that_lists_those_that_are(where):
    with pytest.raises(ValueError, match=f"^--data=torchvision:{where} must be torchvision:NAME@DIR, with a NAME of "
                                         "CIFAR10, CIFAR100, DTD, .*, SVHN, StanfordCars, USPS$"):
        sets.load(where)


def test_a_damaged_file_without_a_checksum_and_a_missing_picture_are_one_sentence(tmp_path, monkeypatch):
    where = pets(tmp_path, monkeypatch)
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images/Abyssinian_0.jpg").unlink()
    with pytest.raises(ValueError, match=r"picture '.*Abyssinian_0\.jpg' cannot be read: No such file"):
        sets.load(where)
    (folder / "annotations/trainval.txt").write_text("Abyssinian_1 1\n")
    with pytest.raises(ValueError, match=f"^--data=torchvision:{where} cannot be read: not enough values"):
        sets.load(where)


def test_download_belongs_to_published_sets():
    with pytest.raises(ValueError, match="^--download=True must come with --data=torchvision:NAME@DIR, not with --da"):
        DataOptions(data="images:x", download=True)


# ---------------------------------------------------------------- a few shots

def supply_of(where, seed=0, **options):
    return Supply(DataOptions(data=f"torchvision:{where}", val_percent=30, **options), TeacherOptions(), seed)


def test_shots_are_so_many_training_pictures_of_every_class_drawn_by_the_seed(tmp_path, monkeypatch):
    where = cifar10(tmp_path, monkeypatch)
    whole = supply_of(where)
    few = {shots: supply_of(where, shots=shots) for shots in (1, 2, 4)}
    ids = {shots: [sample.id for sample in supply.real["train"]] for shots, supply in few.items()}
    for shots, supply in few.items():
        answers = [sample.answer for sample in supply.real["train"]]
        assert {colour: answers.count(colour) for colour in COLOURS} == dict.fromkeys(COLOURS, shots)
        assert [sample.id for sample in supply.real["val"]] == [sample.id for sample in whole.real["val"]]
        assert len(supply.real["test"]) == 6
        assert f"; --shots={shots}: {3 * shots} of {len(whole.real['train'])} to train on" in supply.found
    assert {*ids[1]} < {*ids[2]} < {*ids[4]} < {sample.id for sample in whole.real["train"]}
    assert [sample.id for sample in supply_of(where, shots=2).real["train"]] == ids[2]
    assert [sample.id for sample in supply_of(where, seed=1, shots=2).real["train"]] != ids[2]


def test_shots_that_a_class_has_not_are_one_sentence_that_names_the_class(tmp_path, monkeypatch):
    where = cifar10(tmp_path, monkeypatch)
    answers = [sample.answer for sample in supply_of(where).real["train"]]
    rarest = min(COLOURS, key=answers.count)
    with pytest.raises(ValueError, match=f"^--shots=16 must be at most {answers.count(rarest)}, the training pictures "
                                         f"of class '{rarest}'$"):
        supply_of(where, shots=16)


@pytest.mark.parametrize("data", ["scenes", "jsonl:x", "llava:x"])
def test_shots_of_data_without_classes_are_one_sentence(data):
    with pytest.raises(ValueError, match=f"^--shots=4 must be 0 with --data={data}, which has no classes$"):
        DataOptions(data=data, shots=4)


# ---------------------------------------------------------------- memory

def test_pictures_of_a_set_in_memory_are_views_of_what_torchvision_holds(tmp_path, monkeypatch):
    opened = sets.opened
    for where in (cifar10(tmp_path, monkeypatch), mnist(tmp_path, monkeypatch)):
        held = []

        def recorded(*args):
            held.append(opened(*args))
            return held[-1]
        monkeypatch.setattr(sets, "opened", recorded)
        splits, _ = sets.load(where)
        arrays = [np.asarray(dataset.data) for dataset in held]
        for sample in splits["train"] + splits["test"]:
            assert any(np.may_share_memory(sample.images[0], array) for array in arrays)
            assert to_array(sample.images[0], 16).shape == (16, 16, 3)


MEMORY = """
import hashlib
import sys
from pathlib import Path
import torch
from torchvision import datasets
from data import sample, sets

def kept(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

folder = Path(sys.argv[1]) / "cifar-10-batches-py"

def md5(name):
    return hashlib.md5((folder / name).read_bytes()).hexdigest()
cifar = datasets.CIFAR10
cifar.train_list = [[f"data_batch_{number}", md5(f"data_batch_{number}")] for number in range(1, 6)]
cifar.test_list = [["test_batch", md5("test_batch")]]
cifar.meta = dict(cifar.meta, md5=md5("batches.meta"))
datasets.CIFAR10(sys.argv[1])           # freed at once: its peak is torchvision's own
sample.to_pixels([torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()] * 200, 32)
start, peak = kept("VmRSS"), kept("VmHWM")
splits, report = sets.load(f"CIFAR10@{sys.argv[1]}")
loaded = kept("VmRSS")
for samples in splits.values():
    for first in range(0, len(samples), 200):
        sample.to_pixels([one.images[0] for one in samples[first:first + 200]], 32)
print(report)
print(loaded - start, kept("VmRSS") - loaded, kept("VmHWM") - peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
def test_cifar10_of_full_size_takes_little_more_memory_than_the_arrays_of_torchvision(tmp_path, monkeypatch):
    cifar10(tmp_path, monkeypatch, each=10_000, labels=[f"class {letter}" for letter in "abcdefghij"])
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report, numbers = done.stdout.splitlines()
    assert report.startswith("torchvision: CIFAR10, 60000 pictures, 10 classes; ")
    loaded, reading, peak = map(float, numbers.split())         # MiB; the arrays are 176, a second copy of them as much
    assert loaded < 176 + 100 and reading < 50 and peak < 100, numbers
