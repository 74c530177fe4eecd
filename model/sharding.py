"""The weights of a model that several ranks train: whole on each rank, or in shards over them by FSDP2.

    sharding.shard(vlm, cfg.parallel)                # before the optimizer is made
    sharding.total_gradients(optimizer)              # before its step
    with sharding.whole(vlm): ...                    # sampling

In one process nothing here does anything, as in model/parallel.py.
"""
import os
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor

from model import machine, watchdog
from model.parallel import gather, is_first, meeting, world

BUCKET = 2 ** 25            # numbers of a sum of gradients: few messages, and little memory beside the gradients

_checks = False             # whether the ranks' gradients and weights are compared in this step


# ---------------------------------------------------------------- in shards

def ranks_of_a_node():
    """How many ranks each node has; raises ValueError where nodes differ, since hybrid shards lie alike in all."""
    counts = {*gather(int(os.environ["LOCAL_WORLD_SIZE"]))}
    if len(counts) > 1:
        found = " and ".join(str(count) for count in sorted(counts))
        raise ValueError(f"--shard=hybrid must come with the same number of ranks in every node, not {found}")
    return counts.pop()


@cache
def _mesh(kind, device_type):
    """The ranks as FSDP2 wants them: in a row, or, hybrid, a row of nodes that each hold all shards."""
    if kind == "full":
        return init_device_mesh(device_type, (world(),))
    of_a_node = ranks_of_a_node()
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
        # Inputs stay as they are: among them are gradients that the loss will send back, which must not be rounded.
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=exact, cast_forward_inputs=False)
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
    machine.give_holes_back()       # that the whole weights have left


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


# ---------------------------------------------------------------- gradients

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
    with meeting("the gradients"):
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


# ---------------------------------------------------------------- whether ranks agree

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
                raise ValueError(f"--check-ranks: the {what} of ranks {first} and {number} differ at "
                                 f"{watchdog.place()}, first in {name}: a device or a wire is faulty; --resume goes on "
                                 "from the last checkpoint")
