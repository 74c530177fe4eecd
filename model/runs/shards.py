"""What a stage under way leaves where its weights lie in shards (model/sharding.py): a folder in the format of
torch.distributed.checkpoint, written by all ranks together, read by any number of them, or by one process.

    progress-STEP/      the tensors of module and optimizer, each rank's shards in a file of its own
    progress.pt         all else, and the folder's name, from which on it counts

The metadata inside such a folder is a pickle of torch's: it is the run's own, and nobody else's is ever opened.
"""
import shutil

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from model import parallel, sharding


def are_in(state):
    """Whether any tensor of a state dict lies in shards."""
    return any(isinstance(value, DTensor) for value in state.values())


def tensors_of(weights, optimizer):
    """State dicts of module and optimizer -> {name: tensor} of both, and what of the optimizer's is no tensor."""
    tensors = {f"module.{name}": value for name, value in weights.items()}
    others = {}
    for index, entries in optimizer["state"].items():
        for name, value in entries.items():
            kept = tensors if torch.is_tensor(value) else others
            kept[f"optimizer.{index}.{name}"] = value
    return tensors, others


def save(folder, step, weights, optimizer):
    """Writes progress-STEP under `folder` -> what progress.pt is to say of it. Whatever moment the run is killed at,
    the folder that progress.pt names is whole."""
    tensors, others = tensors_of(weights, optimizer)
    name = f"progress-{step}"
    partial = folder / f".{name}.partial"
    if parallel.is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    parallel.barrier()
    dcp.save(tensors, checkpoint_id=partial)
    parallel.barrier()
    if parallel.is_first():
        shutil.rmtree(folder / name, ignore_errors=True)        # of before a resume, which went on from an earlier one
        partial.rename(folder / name)
    return dict(shards=name, numbers=others)


def remove(folder, but=""):
    """Removes what `save` has left under a folder, but for the one that progress.pt names."""
    if parallel.is_first():
        for path in [*folder.glob("progress-*"), *folder.glob(".progress-*.partial")]:
            if path.name != but:
                shutil.rmtree(path, ignore_errors=True)


def load(folder, said, weights, optimizer):
    """What `save` wrote, as the weights and the optimizer of this run lie -> (state dict of the module's part, state of
    the optimizer). said: what progress.pt says; weights: state dict of the module."""
    path = folder / said["shards"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = {}
    for name, form in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
        part, _, place = name.partition(".")
        if part == "module":
            found[name] = torch.empty_like(weights[place])
            continue
        weight = params[int(place.partition(".")[0])]
        if form.size == weight.shape:
            found[name] = torch.empty_like(weight, dtype=form.properties.dtype)
        else:
            found[name] = torch.empty(form.size, dtype=form.properties.dtype)
    dcp.load(found, checkpoint_id=path, no_dist=parallel.world() == 1)
    module = {}
    state = {}
    for name, value in {**found, **said["numbers"]}.items():
        part, _, place = name.partition(".")
        if part == "module":
            module[place] = value
        else:
            index, _, entry = place.partition(".")
            state.setdefault(int(index), {})[entry] = value
    return module, state


def check(path, state, optimizer):
    """Raises ValueError where the optimizer's state, {index: entries} of the file `path`, is of another AdamW: in
    bfloat16 weights in shards have torch's, whole ones that of model/optim.py."""
    entries = {name for of_weight in state.values() for name in of_weight}
    is_ours = hasattr(optimizer, "master")
    if entries and ("exp_avg" in entries) == is_ours:
        raise ValueError(f"{path} was written with weights {'in shards' if is_ours else 'whole'}, which keep other "
                         f"moments in bfloat16: go on with --shard={'full' if is_ours else 'none'}")


def spread(state, weights, optimizer):
    """Whole tensors of a progress.pt that one process, or ranks with whole weights, wrote -> as this run's lie; state:
    its module's and optimizer's, as `load` returns them."""
    module, of_optimizer = state
    params = [p for group in optimizer.param_groups for p in group["params"]]
    module = {name: sharding.like(value, weights.get(name)) for name, value in module.items()}
    spread_state = {}
    for index, entries in of_optimizer.items():
        spread_state[index] = {name: sharding.like(value, params[index]) if torch.is_tensor(value) else value
                               for name, value in entries.items()}
    return module, spread_state
