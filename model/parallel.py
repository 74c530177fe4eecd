"""One run on several ranks: processes that torchrun starts, each with a device of its own, which train one model.

    torchrun --nproc-per-node=8 train.py ...                # every rank runs the same program on the same data

Whatever is decided from data is decided by all ranks alike: each builds the whole list of work, does its part, and what
comes of it is summed or gathered, so that denominators, groups, early stops and skips are those of one process. Without
torchrun nothing here does anything: one process is rank 0 of 1, and no function touches what it is given.
"""
import json
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from model import watchdog
from model.runs.config import check_fields, choice, first_line, need, number


@dataclass(frozen=True)
class ParallelOptions:
    """several ranks, under torchrun"""
    shard: str = choice("none", "full", "hybrid")   # weights: whole on each rank | in shards | shards in a node
    offload: bool = False                           # shards rest in the memory of the CPU between uses
    plan: str = ""                                  # h100x8, cpux2: print what stages need on so many, and stop
    check_ranks: int = number(0, "[0, 1000000000]")  # steps between comparisons of the ranks' weights; 0: none
    patience: int = number(600, "[1, 1000000]")     # seconds in which no rank gets on, after which the run ends

    def __post_init__(self):
        check_fields(self)
        need(self.shard != "none" or not self.offload, "offload", self.offload, "come with --shard=full or hybrid")


# ---------------------------------------------------------------- who is there

def world():
    """How many ranks there are; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """Whether this is the rank that prints and writes."""
    return rank() == 0


def is_restart():
    """Whether torchrun has started this run again, after a rank died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def is_under_torchrun():
    """Whether torchrun has started this process, also before it has joined the others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def name():
    """How an error calls this rank, with a blank behind it; "" of the first, or without torchrun."""
    number = os.environ.get("RANK", "0") if is_under_torchrun() else "0"
    return "" if number == "0" else f"rank {number}: "


def start(options, device="auto"):
    """Joins the other ranks, where torchrun has started some; from then on only the first prints.

    Tensors of a CPU travel by gloo, those of a GPU, this rank's own of the node, by NCCL. device: as --device. Raises
    ValueError where options of several ranks are given without torchrun, where ranks would share a GPU, and where
    shards are to be offloaded from a CPU.
    """
    if not is_under_torchrun():
        if options.shard != "none":
            raise ValueError(f"--shard={options.shard} must come with torchrun, whose ranks hold the shards")
        return
    backend = "gloo"
    has_gpus = device != "cpu" and torch.cuda.is_available()
    need(has_gpus or not options.offload, "offload", True,
         "be left out on a CPU, in whose memory the shards rest in any case")
    if has_gpus:
        check_gpus(device)
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The watchdog, which knows more to say, comes before this timeout.
    timeout = timedelta(seconds=2 * options.patience + 60)
    store = watchdog.store_of_torchrun(timeout, "ranks")
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]),
                            world_size=int(os.environ["WORLD_SIZE"]), timeout=timeout)
    watchdog.start(rank(), world(), options.patience)
    signal.signal(signal.SIGTERM, _ended)
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def check_gpus(device):
    """Raises ValueError unless each rank of this node can have a GPU of its own, which NCCL asks for."""
    count = int(os.environ["LOCAL_WORLD_SIZE"])
    need(device in ("auto", "cuda") or count == 1, "device", device,
         "be auto, cuda or cpu with several ranks: each takes the GPU of its number in the node")
    gpus = torch.cuda.device_count()
    need(count <= gpus, "device", device,
         f"be cpu where torchrun starts {count} ranks on a machine of {gpus} GPU{'s' * (gpus > 1)}")


def _ended(*_):
    """torchrun ends the other ranks of a node when one has died."""
    watchdog.end(f"ended at {watchdog.place()}, since another rank has died; {watchdog.advice()}", 143)


def lost(error):
    """What to say where an exception means that another rank is gone; "" where it means something else."""
    if world() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return ""
    return f"another rank was gone at {watchdog.place()} ({first_line(error)}); {watchdog.advice()}"


def stop():
    """Leaves the other ranks at the end of a run."""
    watchdog.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device():
    """The GPU of this rank."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if world() > 1 else 0)


# ---------------------------------------------------------------- dealing out

def own_rows(count):
    """The part of `count` rows that is this rank's, a slice; parts follow each other in the order of the ranks."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def before(count):
    """How many rows the ranks before this one have, each so many as it says."""
    return sum(gather(count)[:rank()])


def dealt(items):
    """Those of a list of work that are this rank's: item i belongs to rank i modulo the number of ranks."""
    return items[rank()::world()]


def fewer(items):
    """How many items of a list of work this rank has fewer than the rank with the most: 0 or 1."""
    return -(-len(items) // world()) - len(dealt(items))


# ---------------------------------------------------------------- sums and gathering

@contextmanager
def meeting(what):
    """Around a wait for the other ranks, so that the watchdog can say where one hangs."""
    watchdog.waits_for(what)
    yield
    watchdog.waits_for("")


def barrier():
    """Waits for all ranks."""
    if world() > 1:
        with meeting("the other ranks"):
            dist.barrier()


def gather(value):
    """A value that JSON can hold -> the list of all ranks' values, in their order. Floats arrive as they are."""
    if world() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with meeting("what the other ranks say"):
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world())]
        dist.all_gather(sizes, torch.tensor([len(text)]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[:len(text)] = text
        texts = [torch.empty_like(padded) for _ in range(world())]
        dist.all_gather(texts, padded)
    return [json.loads(bytes(text[:size].tolist())) for text, size in zip(texts, sizes)]


def chained(values):
    """A list of this rank's values, as `gather` takes them -> those of all ranks, in their order, as one list."""
    return [value for of_rank in gather(values) for value in of_rank]


def of_first(value):
    """The first rank's value."""
    return gather(value)[0]


def exchange(tensors):
    """{name: tensor} -> the same of every rank, in their order. Shapes may differ over ranks, devices may not."""
    if world() == 1:
        return [tensors]
    forms = gather({name: _form(tensor) for name, tensor in tensors.items()})
    mine = torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()])
    sizes = [[size for _, _, size in of_rank.values()] for of_rank in forms]
    padded = mine.new_zeros(max(map(sum, sizes)))
    padded[:len(mine)] = mine
    received = [torch.empty_like(padded) for _ in range(world())]
    with meeting("the other ranks' tensors"):
        dist.all_gather(received, padded)
    return [_tensors(buffer, of_rank) for buffer, of_rank in zip(received, forms)]


def _form(tensor):
    """What tells how to read the bytes of a tensor, for `gather`."""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.numel() * tensor.element_size()


def _tensors(buffer, forms):
    """Bytes and {name: _form} -> {name: tensor}."""
    found = {}
    start = 0
    for name, (dtype, shape, size) in forms.items():
        piece = buffer[start:start + size].clone()              # a view of another dtype must begin at its own memory
        found[name] = piece.view(getattr(torch, dtype)).view(shape)
        start += size
    return found


def total(value):
    """The sum of a number, or of a tensor, over ranks; of one process the value itself."""
    if world() == 1:
        return value
    if not torch.is_tensor(value):
        return sum(gather(value))
    value = value.clone()
    with meeting("a sum"):
        dist.all_reduce(value)
    return value


def joined(*rows):
    """Tensors (n, ..) of this rank, with gradient -> of all ranks, (N, ..) each. The gradient reaches this rank's rows
    alone: where each rank computes the same loss of all rows, the sum over ranks is that of one process."""
    if world() == 1:
        return rows
    found = exchange({str(place): tensor for place, tensor in enumerate(rows)})
    whole = []
    for place, mine in enumerate(rows):
        of_ranks = [tensors[str(place)] for tensors in found]
        of_ranks[rank()] = mine
        whole.append(torch.cat(of_ranks))
    return whole


def once(weight):
    """A weight that every rank uses for the same loss: only the first has its gradient, since ranks are summed."""
    return weight if is_first() else weight.detach()
