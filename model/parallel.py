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
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor

from model import watchdog
from model.runs.config import check_fields, choice, first_line, need, number

_checks = False             # whether the ranks' gradients and weights are compared in this step
BUCKET = 2 ** 25            # numbers of a sum of gradients: few messages, and little memory beside the gradients


@dataclass(frozen=True)
class ParallelOptions:
    """several ranks, under torchrun"""
    shard: str = choice("none", "full", "hybrid")   # weights: whole on each rank | in shards | shards in a node
    offload: bool = False                           # shards rest in the memory of the CPU between uses
    check_ranks: int = number(0, "[0, 1000000000]")  # steps from one comparison of the ranks' weights to the next; 0: none
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


def name():
    """How an error calls this rank, with a blank behind it; "" of the first, or without torchrun."""
    number = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    return "" if number == "0" else f"rank {number}: "


def start(options):
    """Joins the other ranks, where torchrun has started some; from then on only the first prints.

    Tensors of a CPU travel by gloo, those of a GPU, this rank's own of the node, by NCCL. Raises ValueError where
    options of several ranks are given without torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if options.shard != "none":
            raise ValueError(f"--shard={options.shard} must come with torchrun, whose ranks hold the shards")
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The watchdog, which knows more to say, comes before this timeout.
    dist.init_process_group(backend, timeout=timedelta(seconds=2 * options.patience + 60))
    watchdog.start(rank(), world(), options.patience)
    signal.signal(signal.SIGTERM, _ended)
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def _ended(*_):
    """torchrun ends the other ranks of a node when one has died."""
    watchdog.end(f"ended at {watchdog.place()}, since another rank has died; --resume goes on from the last checkpoint",
                 143)


def lost(error):
    """What to say where an exception means that another rank is gone; "" where it means something else."""
    if world() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return ""
    return (f"at {watchdog.place()} another rank was gone ({first_line(error)}); --resume goes on from the last "
            "checkpoint")


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


# ---------------------------------------------------------------- sums and gathering

@contextmanager
def _meeting(what):
    """Around a wait for the other ranks, so that the watchdog can say where one hangs."""
    watchdog.waits_for(what)
    yield
    watchdog.waits_for("")


def barrier():
    """Waits for all ranks."""
    if world() > 1:
        with _meeting("the other ranks"):
            dist.barrier()


def gather(value):
    """A value that JSON can hold -> the list of all ranks' values, in their order. Floats arrive as they are."""
    if world() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with _meeting("what the other ranks say"):
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world())]
        dist.all_gather(sizes, torch.tensor([len(text)]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[:len(text)] = text
        texts = [torch.empty_like(padded) for _ in range(world())]
        dist.all_gather(texts, padded)
    return [json.loads(bytes(text[:size].tolist())) for text, size in zip(texts, sizes)]


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
    with _meeting("the other ranks' tensors"):
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
    with _meeting("a sum"):
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


def begin_step(place, checks):
    """Tells the watchdog what this rank is at, as in "rl, step 3". checks: the ranks' gradients and weights are
    compared in this step."""
    global _checks
    watchdog.at(place)
    _checks = checks and world() > 1


def check_weights(module):
    """Compares the weights of a step that checks, at its end."""
    if _checks:
        rest(module)
        check("weights", dict(module.named_parameters()))


def check(what, tensors):
    """Raises ValueError unless all ranks that hold the same tensors, or the same shards of them, hold the same bits."""
    mine = {}
    for name, tensor in tensors.items():
        holder, tensor = "", tensor.detach()
        if isinstance(tensor, DTensor):         # hybrid: the same shard lies in every node
            holder = str(tensor.device_mesh.get_coordinate()[-1])
            tensor = tensor.to_local()
        integers = torch.int32 if tensor.element_size() >= 4 else torch.int16
        mine[name] = [holder, int(tensor.contiguous().view(-1).view(integers).sum(dtype=torch.long))]
    first_of = {}
    for number, of_rank in enumerate(gather(mine)):
        for name, (holder, bits) in of_rank.items():
            first, its_bits = first_of.setdefault((name, holder), (number, bits))
            if bits != its_bits:
                raise ValueError(f"--check-ranks: the {what} of ranks {first} and {number} differ at {watchdog.place()}, "
                                 f"first in {name}: a device or a wire is faulty; --resume goes on from the last "
                                 "checkpoint")


def total_gradients(optimizer):
    """Sums the gradients of what an optimizer steps over ranks, in place. A loss is divided by the denominator of all
    ranks already. Weights in shards have theirs summed by the backward."""
    if world() == 1:
        return
    params = []
    for group in optimizer.param_groups:
        params += group["params"]
    _forget_unused(params)
    params = [p for p in params if not isinstance(p, DTensor)]
    # A weight that no rank has used keeps no gradient: with one of zeros the optimizer would decay it.
    used = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8)
    with _meeting("the gradients"):
        dist.all_reduce(used, dist.ReduceOp.MAX)
        gradients = [_gradient(p) for p, is_used in zip(params, used.tolist()) if is_used]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.view(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
                gradient.copy_(summed.view_as(gradient))
    if _checks:
        check("gradients", {str(place): p.grad for place, p in enumerate(params) if p.grad is not None})


def _forget_unused(params):
    """Takes the gradient of zeros from shards of weights that read pictures, where no rank had any."""
    readers = {id(p): p.read_with_pictures_of for p in params if hasattr(p, "read_with_pictures_of")}
    models = list(dict.fromkeys(readers.values()))
    if not models:
        return
    seen = gather([model.saw_pictures for model in models])
    used = {model for model, *of_ranks in zip(models, *seen) if any(of_ranks)}
    for p in params:
        if id(p) in readers and readers[id(p)] not in used:
            p.grad = None
    for model in models:
        model.saw_pictures = False


def _gradient(p):
    """The gradient of a weight, which is made of zeros where this rank did not use it."""
    if p.grad is None:
        p.grad = torch.zeros_like(p, dtype=getattr(p, "grad_dtype", None) or p.dtype)
    return p.grad


def _buckets(gradients):
    """Lists of gradients of one dtype, each of at most BUCKET numbers, or of one gradient."""
    buckets = []
    room = 0
    for gradient in gradients:
        if not buckets or buckets[-1][0].dtype != gradient.dtype or room < gradient.numel():
            buckets.append([])
            room = BUCKET
        buckets[-1].append(gradient)
        room -= gradient.numel()
    return buckets


# ---------------------------------------------------------------- weights in shards

@cache
def _mesh(kind, device_type):
    """The ranks as FSDP2 wants them: in a row, or, hybrid, a row of nodes that each hold all shards."""
    if kind == "full":
        return init_device_mesh(device_type, (world(),))
    of_a_node = int(os.environ["LOCAL_WORLD_SIZE"])
    return init_device_mesh(device_type, (world() // of_a_node, of_a_node), mesh_dim_names=("replicate", "shard"))


def shard(vlm, options, by_states=False):
    """Spreads a vision-language model over the ranks by FSDP2, in place, as ParallelOptions say; none: leaves it.

    A block is a unit that is gathered, and so is what lies around the blocks: projector, embedding, norm and head, tied
    or not, which stay whole from a forward to its backward. The frozen image tower is whole on every rank. What trains
    in a dtype narrower than fp32 lies in fp32 shards, the optimizer's copy, and is gathered in its own dtype.
    by_states: the model is asked for its `states`, too, beside or instead of a forward.
    """
    if options.shard == "none":
        return
    dtype = vlm.llm.embed_tokens.weight.dtype
    device_type = vlm.llm.embed_tokens.weight.device.type
    exact = torch.promote_types(dtype, torch.float32)
    precision = MixedPrecisionPolicy()
    if dtype != exact:
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=exact)
    settings = dict(mesh=_mesh(options.shard, device_type), mp_policy=precision,
                    offload_policy=CPUOffloadPolicy() if options.offload else OffloadPolicy())
    for block in vlm.llm.layers:
        _widen(block, exact)
        fully_shard(block, **settings)
    _widen(vlm, exact)
    fully_shard(vlm, reshard_after_forward=False, ignored_params={*vlm.visual.parameters()}, **settings)
    vlm.saw_pictures = False
    for p in vlm.picture_weights():
        p.read_with_pictures_of = vlm
    for module in _shards_of(vlm):
        module.set_gradient_divide_factor(1.0)                  # a loss is divided by the denominator of all ranks
        module.set_force_sum_reduction_for_comms(True)          # gloo has no other
    register_fsdp_forward_method(vlm, "inside")
    if by_states:
        register_fsdp_forward_method(vlm, "states")


def _widen(module, dtype):
    """Puts what trains into fp32, unless it lies in shards already."""
    for p in module.parameters():
        if p.requires_grad and not isinstance(p, DTensor):
            p.data = p.data.to(dtype)


def _shards_of(module):
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def is_sharded(module):
    return isinstance(module, FSDPModule)


def class_of(module):
    """The class of a module; FSDP2 makes one of its own from it, (FSDPModule, class)."""
    return type(module).__mro__[2] if is_sharded(module) else type(module)


@contextmanager
def whole(model):
    """Inside it all weights of a model are whole on every rank, for sampling, where each token would gather them."""
    shards = _shards_of(model)
    for module in shards:
        module.unshard()
    yield
    for module in shards:
        module.reshard()


def rest(module):
    """Lets go of what forwards have left gathered."""
    for part in _shards_of(module):
        part.reshard()


def fewer(items):
    """How many items of a list of work this rank has fewer than the rank with the most: 0 or 1."""
    return -(-len(items) // world()) - len(dealt(items))


def whole_tensor(value):
    """A tensor in shards -> whole, by all ranks together; others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value, weight):
    """A whole tensor, the same on all ranks, as the weight of its shape lies: in shards, if that does."""
    if not isinstance(weight, DTensor) or value.shape != weight.shape:
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)


def full_state(vlm, dtype):
    """The state dict of a model for a file: whole, on the first rank; the others get nothing of what lies in shards."""
    if not is_sharded(vlm):
        return vlm.state_dict()
    state = {}
    for name, value in vlm.state_dict().items():
        value = whole_tensor(value)
        if is_first():
            state[name] = value.to("cpu", dtype)
    return state
