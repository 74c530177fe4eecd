"""The one place where device and dtype are decided."""
from dataclasses import dataclass

import torch

from model import parallel
from model.runs.config import check_fields, choice, first_line, number

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "mixed": torch.float32}


@dataclass(frozen=True)
class MachineOptions:
    """the machine"""
    device: str = "auto"                            # auto: CUDA when present | cpu | cuda:N
    # mixed: float32 but for the products of the decoder's blocks, in bfloat16 (model/mixed.py)
    dtype: str = choice("float32", "mixed", "bfloat16", "float64")  # of weights and activations
    compile: bool = False                           # torch.compile the decoder's blocks: a minute, then faster steps
    checkpointing: bool = False                     # a block's activations are computed again in the backward
    threads: int = number(0, "[0, 1024]")           # CPU threads; 0: torch's choice. Another number rounds differently

    def __post_init__(self):
        check_fields(self)


def pick_device(name="auto"):
    """'auto' takes CUDA when present, of several ranks each its own, else the CPU; raises ValueError on a device this
    machine does not have.

    Turns cuDNN's attention off: it plans anew for every shape, and in decoding each token is a new one. PyTorch's flash
    and memory-efficient kernels plan nothing.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if name == "auto":
        if torch.cuda.is_available() and parallel.world() > 1:
            return parallel.own_device()
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).split(". ")[0]
        raise ValueError(f"--device={name} is not available here: {reason}") from None
    return device


def pick_dtype(name):
    """'float32', 'mixed', 'bfloat16' or 'float64' -> torch dtype of the weights."""
    if name not in DTYPES:
        raise ValueError(f"--dtype={name} must be one of {', '.join(DTYPES)}")
    return DTYPES[name]
