"""Folders of named tensors as the hub has them: model.safetensors or pytorch_model.bin, whole or in shards.

Names and shapes are read before any data, and tensors one at a time from memory-mapped files, so that a folder is
checked whole before anything is loaded and a model needs no second copy in memory.
"""
import json
import os
import shutil
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

INDEX = ".index.json"
KINDS = ("model.safetensors", "pytorch_model.bin")


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
    """The files that hold a folder's tensors, with the index's own map name -> file, {} without an index."""
    for kind in KINDS:
        if (folder / kind).exists():        # whole: an index beside it is left over
            return [folder / kind], {}
        if (folder / (kind + INDEX)).exists():
            index = read_json(folder / (kind + INDEX))
            where = index.get("weight_map")
            if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
                raise ValueError(f"{str(folder / (kind + INDEX))!r} must map tensors to files under 'weight_map'")
            files = sorted(set(where.values()))
            if lost := [file for file in files if not (folder / file).is_file()]:
                raise ValueError(f"folder {str(folder)!r} lacks {', '.join(lost)}, {len(lost)} of the {len(files)} "
                                 f"shards that its {kind + INDEX} names")
            return [folder / file for file in files], where
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}
    raise ValueError(f"folder {str(folder)!r} holds no weights: expected {' or '.join(KINDS)}, or shards with an index")


class TensorFolder:
    """shapes: name -> tuple of every tensor in the folder. Raises ValueError when a file is missing or damaged."""

    def __init__(self, folder):
        self.folder, self.shapes, self._where, self._rows, self._held = Path(folder), {}, {}, {}, (None, {})
        files, mapped = _files(self.folder)
        for file in files:
            read = self._safetensors if file.suffix == ".safetensors" else self._pickle
            for name, shape in read(file).items():
                self.shapes[name], self._where[name] = shape, file
        if lost := [name for name in mapped if name not in self.shapes]:
            raise ValueError(f"folder {str(folder)!r}: its index names {len(lost)} tensors that the shards lack, "
                             f"{some(lost)}")

    @staticmethod
    def _safetensors(file):
        try:
            with safetensors.safe_open(file, "pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{str(file)!r} is truncated or not a safetensors file: {error}") from None

    def _pickle(self, file):
        try:
            try:
                held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                held = torch.load(file, map_location="cpu", weights_only=True)      # written before torch 1.6
            self._held = file, {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
        except Exception as error:      # whatever a damaged file makes of torch's reader
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{str(file)!r} cannot be read as a PyTorch file of tensors: {said}") from None
        return {name: tuple(value.shape) for name, value in self._held[1].items()}

    def shorten(self, name, rows):
        """From now on the tensor is its first `rows` rows."""
        self._rows[name] = rows
        self.shapes[name] = (min(rows, self.shapes[name][0]), *self.shapes[name][1:])

    def get(self, name):
        """The tensor, in memory that may still be the file's: copy it before the folder goes. Raises ValueError when it
        does not hold floating-point numbers."""
        file = self._where[name]
        if file.suffix != ".safetensors":
            if self._held[0] != file:       # one file at a time: asked for in the order of `by_file`, each opens once
                self._held = None, {}
                self._pickle(file)
            tensor = self._held[1][name]
        else:       # opened anew for each: a file kept open keeps every page that was read from it in the process
            with safetensors.safe_open(file, "pt") as opened:
                tensor = opened.get_tensor(name)
        if not tensor.is_floating_point():
            raise ValueError(f"folder {str(self.folder)!r}: {name} holds {tensor.dtype}, expected floating-point "
                             "numbers")
        return tensor[:self._rows[name]] if name in self._rows else tensor

    def by_file(self, name):
        """Sorts names so that those of one file are neighbours."""
        return str(self._where[name])


def some(names, count=5):
    """The first few of a list, for a message."""
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def write_folder(folder, tensors, texts, shard_bytes=5 * 2 ** 30):
    """A new folder with `tensors` (name -> tensor) as safetensors, in shards with an index when they exceed
    `shard_bytes`, and the files `texts` (name -> str or bytes). It appears whole or not at all.

    Raises ValueError when `folder` exists and holds anything, OSError in one sentence when it cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists and is not an empty folder; it is not written over")
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        where = {}
        for n, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in shard.items()}, partial / file, {"format": "pt"})
            (partial / file).chmod(0o644)       # safetensors leaves it to its owner alone; servers run as others
            where |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            texts = texts | {KINDS[0] + INDEX: json.dumps(dict(metadata=dict(total_size=total), weight_map=where))}
        for name, text in texts.items():
            (partial / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"cannot write {str(folder)!r}: {getattr(error, 'strerror', None) or error}") from None
