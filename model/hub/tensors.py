"""Folders of named tensors as the hub has them: model.safetensors or pytorch_model.bin, whole or
in shards.

Names and shapes are read before any data, and tensors one at a time from memory-mapped files, so
that a folder is checked whole before anything is loaded and a model needs no second copy in
memory.
"""
import json
import os
import shutil
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from model.runs.config import first_line

INDEX = ".index.json"
KINDS = ("model.safetensors", "pytorch_model.bin")


# ---------------------------------------------------------------- messages

def first_few(names, count=5):
    """The first few of a list, for a message."""
    names = sorted(names)
    shown = ", ".join(names[:count])
    if len(names) > count:
        shown += f" and {len(names) - count} more"
    return shown


# ---------------------------------------------------------------- in

def read_json(path):
    """Raises ValueError in one sentence when the file is missing or is not a JSON object."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{str(path)!r} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, not {type(found).__name__}")
    return found


def _files(folder):
    """-> (the files that hold a folder's tensors, its index's map name -> file; {} without an
    index)."""
    for kind in KINDS:
        if (folder / kind).exists():        # one whole file: an index beside it is left over
            return [folder / kind], {}
        if (folder / (kind + INDEX)).exists():
            return _shard_files(folder, kind)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}
    raise ValueError(f"folder {str(folder)!r} holds no weights: expected {' or '.join(KINDS)}, or "
                     "shards with an index")


def _shard_files(folder, kind):
    index = folder / (kind + INDEX)
    file_of = read_json(index).get("weight_map")
    is_map = isinstance(file_of, dict) and len(file_of) > 0
    if not is_map or not all(isinstance(file, str) for file in file_of.values()):
        raise ValueError(f"{str(index)!r} must map tensors to files under 'weight_map'")
    files = sorted(set(file_of.values()))
    lost = [file for file in files if not (folder / file).is_file()]
    if lost:
        raise ValueError(f"folder {str(folder)!r} lacks {', '.join(lost)}, {len(lost)} of the "
                         f"{len(files)} shards that its {index.name} names")
    return [folder / file for file in files], file_of


def _safetensors_shapes(file):
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is truncated or not a safetensors file: {error}") from None


def _pickled_tensors(file):
    """name -> tensor, memory-mapped where the file allows it."""
    options = dict(map_location="cpu", weights_only=True)
    try:
        try:
            state = torch.load(file, mmap=True, **options)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(file, **options)         # written before torch 1.6
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    except Exception as error:      # whatever a damaged file makes of torch's reader
        raise ValueError(f"{str(file)!r} cannot be read as a PyTorch file of tensors: "
                         f"{first_line(error)}") from None


class TensorFolder:
    """shapes: name -> tuple of every tensor in the folder. Raises ValueError when a file is
    missing or damaged."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.shapes = {}
        self._file_of = {}          # name -> file
        self._rows = {}             # name -> how many of its rows count
        self._pickle = None         # the .bin file that is open, and its tensors
        self._pickled = {}
        files, index = _files(self.folder)
        for file in files:
            for name, shape in self._read_shapes(file).items():
                self.shapes[name] = shape
                self._file_of[name] = file
        lost = [name for name in index if name not in self.shapes]
        if lost:
            raise ValueError(f"folder {str(folder)!r}: its index names {len(lost)} tensors that "
                             f"the shards lack, {first_few(lost)}")

    def _read_shapes(self, file):
        if file.suffix == ".safetensors":
            return _safetensors_shapes(file)
        return {name: tuple(value.shape) for name, value in self._open_pickle(file).items()}

    def _open_pickle(self, file):
        """One .bin file is open at a time: asked for in the order of `by_file`, each is opened
        once."""
        if self._pickle != file:
            self._pickle = None
            self._pickled = {}          # the last file's memory goes before the next file comes
            self._pickled = _pickled_tensors(file)
            self._pickle = file
        return self._pickled

    def shorten(self, name, rows):
        """From now on the tensor is its first `rows` rows."""
        had, *rest = self.shapes[name]
        self.shapes[name] = (min(rows, had), *rest)
        self._rows[name] = rows

    def get(self, name):
        """The tensor, in memory that may still be the file's: copy it before the folder goes.
        Raises ValueError when it does not hold floating-point numbers."""
        file = self._file_of[name]
        if file.suffix == ".safetensors":
            # Opened anew for each tensor: an open file holds every page that was read from it.
            with safetensors.safe_open(file, "pt") as opened:
                tensor = opened.get_tensor(name)
        else:
            tensor = self._open_pickle(file)[name]
        if not tensor.is_floating_point():
            raise ValueError(f"folder {str(self.folder)!r}: {name} holds {tensor.dtype}, expected "
                             "floating-point numbers")
        if name in self._rows:
            return tensor[:self._rows[name]]
        return tensor

    def by_file(self, name):
        """Sorts names so that those of one file are neighbours."""
        return str(self._file_of[name])


# ---------------------------------------------------------------- out

def write_folder(folder, tensors, texts, shard_bytes=5 * 2 ** 30):
    """A new folder with `tensors` (name -> tensor) as safetensors, in shards with an index when
    they exceed `shard_bytes`, and the files `texts` (name -> str or bytes). It appears whole or
    not at all.

    Raises ValueError when `folder` exists and holds anything, OSError in one sentence when it
    cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists and is not an empty folder; "
                         "it is not written over")
    shards = _shards(tensors, shard_bytes)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, shard in shards.items():
            save_file({name: tensor.contiguous() for name, tensor in shard.items()},
                      partial / file, {"format": "pt"})
            # safetensors lets its owner alone read it; servers run as other users.
            (partial / file).chmod(0o644)
        if len(shards) > 1:
            texts = texts | {KINDS[0] + INDEX: _index(shards)}
        for name, text in texts.items():
            content = text if isinstance(text, bytes) else text.encode()
            (partial / name).write_bytes(content)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"cannot write {str(folder)!r}: "
                      f"{getattr(error, 'strerror', None) or error}") from None


def _shards(tensors, shard_bytes):
    """name -> tensor, in order, cut into file -> {name: tensor}; a tensor larger than a shard is
    one by itself."""
    shards = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {KINDS[0]: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n,
            shard in enumerate(shards, 1)}


def _index(shards):
    total = 0
    file_of = {}
    for file, shard in shards.items():
        total += sum(tensor.nbytes for tensor in shard.values())
        file_of |= dict.fromkeys(shard, file)
    return json.dumps(dict(metadata=dict(total_size=total), weight_map=file_of))
