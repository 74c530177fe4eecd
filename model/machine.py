"""What the machine has, and what this process holds of it: the sides of the plan of memory (model/memory.py) that no
shape tells."""
import ctypes
import gc
import os
from pathlib import Path

import torch
from torch import nn

from kernels import linear_logp

# Where a container's limit stands: of cgroup v2, of v1.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# mallopt's names, from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def own_pages(width):
    """Bytes from which a block has pages of its own where memory is short, for a decoder of this width. A fresh page
    costs time: at 256 KiB the default run, of width 128, takes 1.3 times its CPU time."""
    return 2 ** 18 if width >= 256 else 2 ** 20


def give_blocks_back(width):
    """Tells glibc to give every block from `own_pages` on pages that the system has back when the block is freed.

    Left alone, glibc raises that border up to 32 MiB and takes larger and larger blocks from its heap. There the ones
    that a forward frees leave holes between those that autograd keeps, too small by a few bytes for the next aligned
    block of the same size: a reinforcement learning step of SmolLM2 with LoRA then took 4.3 GiB in place of 2.7. The
    heap itself keeps up to 256 MiB at its end, so that small blocks ask the system for nothing. It is not free: every
    page of every result is a new one, and an update of the bench takes 1.7 times as long. Does nothing elsewhere than
    on glibc, or where MALLOC_MMAP_THRESHOLD_ says otherwise.
    """
    mallopt = of_glibc("mallopt")
    if mallopt and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, own_pages(width))
        mallopt(M_TRIM_THRESHOLD, 2 ** 28)


def give_holes_back():
    """Collects what nothing refers to, and tells glibc to give the system the free pages between its blocks."""
    gc.collect()
    malloc_trim = of_glibc("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


def of_glibc(name):
    """A function of glibc's own, None where the C library is another."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):        # macOS, musl, Windows
        return None


def number_after(name, path):
    """Bytes that a line "NAME: 123 kB" of one of Linux's files states; None where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        title, _, value = line.partition(":")
        if title == name:
            return 1024 * int(value.split()[0])
    return None


def resident():
    """Bytes of memory that this process holds; 0 where the system does not say."""
    return number_after("VmRSS", "/proc/self/status") or 0


def container_limit():
    """Bytes that this process's container may take; None without a limit."""
    for path in LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def room(device):
    """Bytes that this process can still have on a torch.device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator has taken from the GPU and holds no tensor is free as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = number_after("MemAvailable", "/proc/meminfo")
    limit = container_limit()
    rooms = []
    if free is not None:
        rooms.append(free)
    if limit is not None:
        rooms.append(max(0, limit - resident()))
    return min(rooms) if rooms else None


def warm_up():
    """A training step on a CPU that changes nothing, so that `resident` counts what libraries load at first use: the
    first optimizer imports torch._dynamo, 70 MiB, and the first matmuls, attention and backward read in some 20 MiB of
    code."""
    layer = nn.Linear(8, 8, device="meta").to_empty(device="cpu")      # without a draw of torch's random numbers
    for p in layer.parameters():
        nn.init.zeros_(p)
    x = layer(torch.ones(1, 1, 4, 8))
    x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    logp, _ = linear_logp(x.flatten(0, -2), layer.weight, torch.zeros(4, dtype=torch.long))
    logp.sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


class Usage:
    """What a run holds beside its model. bare: bytes that the process held before the run began."""

    def __init__(self, bare):
        self.bare = bare
        self.is_warm = False

    def held(self):
        """Bytes since then; 0 where the system does not say. What loading a model has freed is no part of it."""
        if not self.is_warm:
            warm_up()
            self.is_warm = True
        give_holes_back()
        return max(0, resident() - self.bare)
