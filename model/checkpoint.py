"""Save and load without ever leaving half a file, and without unsafe pickles."""
import os
import zipfile
from pathlib import Path

import torch


def write_atomically(path, write):
    """Calls write(file) on a temporary neighbour, flushes it to the disk, then renames it over `path`.

    Whoever reads `path` finds the old file or the new one, whole. Raises OSError with one sentence when the disk is
    full or the folder cannot be written; the old file is then untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a full disk as a RuntimeError.
        partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise OSError(f"cannot write {str(path)!r}: {reason}; what was saved before is intact") from None


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
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from None
