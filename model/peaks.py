"""What a card can do: GPUs by their data sheets, the CPU of this machine by measuring it, in a second or two.

    card_of("h100", 8)
    card_of("cpu", 2)           # one of two ranks that share this machine's cores
"""
import os
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import nn

from kernels.bench import fastest
from model import machine

# Shares of the peaks that are assumed to be reached. few: of `flops`, by products of the few rows of a decode step;
# hidden: of what ranks exchange in forward and backward, the part that goes on beside the computation, and costs
# nothing; overlap: of the shorter of reading weights and multiplying, in a decode step, the same; traffic: how often
# what autograd keeps is read or written beside the products, 0 where `matmul` has that in it; calls: what an operation
# of the model takes, in those that are measured.
EFFICIENCY = dict(matmul=0.45, few=0.45, bandwidth=0.6, exchange=0.7, hidden=0.5, overlap=1.0, traffic=0.0, calls=1.0)

# Of a CPU, whose peaks are measured. A core does one thing after the other, and a sum over many numbers, by which
# reading is measured, is no faster than what else reads.
CPU_EFFICIENCY = dict(matmul=0.8, few=0.37, bandwidth=1.0, exchange=1.0, hidden=0.0, overlap=0.0, traffic=5.0,
                      calls=2.0)


@dataclass(frozen=True)
class Card:
    """Peaks: FLOP/s of dense matmuls in bf16, of a CPU in fp32; bytes of memory; bytes/s of it, of the wires to the
    cards of a node (one way), and to other nodes; sums: of the wires in a sum over all, where that has another rate;
    seconds of an operation, however small; shares: what is assumed to be reached."""
    flops: float
    memory: float
    bandwidth: float
    inside: float
    outside: float
    of_a_node: int = 8
    sums: float = 0.0
    operation: float = 0.0
    shares: dict = field(default_factory=lambda: EFFICIENCY)


# NVIDIA's data sheets of the SXM cards with 80, 80 and 141 GB, NVLink one way; 200 and 400 Gb/s a card between nodes,
# as in their DGX machines.
CARDS = {"a100": Card(312e12, 80e9, 2.039e12, 300e9, 25e9),
         "h100": Card(989e12, 80e9, 3.35e12, 450e9, 50e9),
         "h200": Card(989e12, 141e9, 4.8e12, 450e9, 50e9)}


def card_of(name, ranks):
    """A card by its name; of "cpu" what each of so many ranks has."""
    return cpu(ranks) if name == "cpu" else CARDS[name]


# ---------------------------------------------------------------- this machine

MATMUL = 2048               # rows and columns of the matrices that are multiplied
READ = 2 ** 26              # numbers that are read, more than caches hold
SENT = 2 ** 22              # numbers that ranks gather
SMALL = 1000                # operations on few numbers
MEMBERS = 4                 # ranks that exchange, at most: each is a thread here


@cache
def cpu(ranks):
    """The Card that each of so many ranks has where all of them work at once. Memory and its bandwidth are shared
    evenly, and so are the cores where there are fewer than ranks."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(cores())
        bandwidth = read_rate() / ranks
        threads = threads_of(ranks)
        torch.set_num_threads(threads)
        flops = matmul_rate() * min(1.0, cores() / (ranks * threads))
        operation = seconds_of_an_operation()
        inside, sums = exchange_rates(min(ranks, MEMBERS)) if ranks > 1 else (1.0, 1.0)
    finally:
        torch.set_num_threads(before)
    return Card(flops, whole_memory() / ranks, bandwidth, inside, inside, ranks, sums, operation, CPU_EFFICIENCY)


def cores():
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def threads_of(ranks):
    """Threads of each of so many ranks of this machine."""
    return max(1, cores() // ranks)


def whole_memory():
    """Bytes of the machine, or those that its container may take; infinite where the system does not say."""
    sizes = [machine.number_after("MemTotal", "/proc/meminfo"), machine.container_limit()]
    return min((size for size in sizes if size), default=float("inf"))


def matmul_rate():
    """FLOP/s of a large product in fp32."""
    a = torch.ones(MATMUL, MATMUL)
    out = torch.empty_like(a)
    return 2 * MATMUL ** 3 / fastest(lambda: torch.mm(a, a, out=out), times=3)


def read_rate():
    """Bytes/s of a sum over many numbers."""
    numbers = torch.ones(READ)
    return 4 * READ / fastest(numbers.sum, times=4)


def seconds_of_an_operation():
    """Of a module on few numbers, which cost nothing beside the call."""
    module = nn.SiLU()
    x = torch.ones(16, requires_grad=True)
    return fastest(lambda: [module(x) for _ in range(SMALL)], times=3) / SMALL


def exchange_rates(ranks):
    """Bytes/s that a rank sends by gloo -> (in gathering into new memory and copying out of it, as FSDP2 does; in a
    sum). Threads of this process stand for the ranks."""
    store = dist.HashStore()
    seconds = [None] * ranks

    def member(rank):
        group = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=60))
        part = torch.ones(SENT // ranks)
        whole = torch.zeros(SENT // ranks * ranks)

        def gather():
            received = torch.empty_like(whole)
            group._allgather_base(received, part).wait()
            return received.clone()

        seconds[rank] = fastest(gather, times=4), fastest(lambda: group.allreduce([whole]).wait(), times=4)

    members = [threading.Thread(target=member, args=(rank,)) for rank in range(ranks)]
    for one in members:
        one.start()
    for one in members:
        one.join()
    sent = 4 * SENT * (ranks - 1) / ranks
    gathering = max(gather for gather, _ in seconds)
    summing = max(total for _, total in seconds)
    return sent / gathering, 2 * sent / summing
