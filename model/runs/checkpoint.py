"""Save and load without ever leaving half a file, and without unsafe pickles."""
import gc
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from model import parallel
from model.runs.config import first_line

LARGE = 2 ** 26             # bytes of a checkpoint that must not lie about unused


def write_atomically(path, write):
    """Calls write(file) on a temporary neighbour, flushes it to the disk, then renames it over `path`.

    Whoever reads `path` finds the old file or the new one, whole. Of several ranks only the first writes. Raises
    OSError with one sentence when the disk is full or the folder cannot be written; the old file is then untouched.
    """
    if not parallel.is_first():
        return
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer trips over the write that failed, as a RuntimeError; what failed stands behind it.
        cause = error
        while not isinstance(cause, OSError) and cause.__context__:
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or first_line(error)
        raise OSError(f"cannot write {str(path)!r}: {reason}; what was saved before is intact") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def write_bytes(path, data):
    """Writes a file of these bytes, as `write_atomically`."""
    write_atomically(path, lambda file: file.write(data))


def save(path, state):
    """state: nested dicts and lists of tensors, numbers, strings and bytes."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path, device="cpu"):
    """Raises ValueError in one sentence when the file is missing, truncated or not a checkpoint of this project."""
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is truncated or not a checkpoint")
        state = torch.load(path, map_location=device, weights_only=True)
        if Path(path).stat().st_size > LARGE:
            # torch's reader leaves a cycle of objects that holds all tensors until Python looks for such: a second and
            # third copy of the model, where a run reads its shape, its tokenizer and then its weights.
            gc.collect()
        if not isinstance(state, dict) or "stage" not in state:
            raise ValueError("it is a PyTorch file but not a checkpoint of this project")
        return state
    except pickle.UnpicklingError:
        reason = "it holds more than tensors, numbers and text, and is not opened"
    except Exception as error:      # whatever a damaged file makes of torch's reader
        reason = first_line(error)
    raise ValueError(f"checkpoint {str(path)!r} cannot be read: {reason}")
