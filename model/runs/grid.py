"""--grid: an ablation as one command, a run for every combination of values and every seed.

    cells = read_cells(cfg, "norm=token,sequence;kl_coef=0,0.04")       # [{"norm": "token", "kl_coef": 0.0}, ..]
    plan = planned(cfg, cells, seeds, stages, first_touched, implied, folder)
    run_all(script, plan.shared, jobs, folder); run_all(script, plan.cells, jobs, folder)

The stages before the first that any of the options touches are the same in all cells: each seed trains them once, in
shared-seed-N, and its cells, cell-K-seed-N, start from there.
"""
from itertools import product
from typing import NamedTuple

from model.runs.config import change, flag, need, options, parse_value
from model.runs.seeds import one_run


def read_cells(cfg, text):
    """The text of --grid -> a list of {option: value}, a dict each cell, the last option fastest. Values are separated
    by commas, those that hold commas themselves by |. Raises ValueError, one sentence, for what is no grid."""
    known = options(type(cfg))
    values = {}                                 # option -> its values
    for part in text.split(";"):
        name, equals, listed = part.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        need(equals and listed, "grid", text, f"hold NAME=VALUE,VALUE;..: {part!r} is none")
        need(name in known, "grid", text, f"name options of train.py; {name!r} is none")
        group, option = known[name]
        need(group not in ("run", "machine", "parallel", "inspect"), "grid", text,
             f"name options that a cell may set; {name!r} is none")
        need(name not in values, "grid", text, f"hold the values of {name} once")
        words = listed.split("|" if "|" in listed else ",")
        values[name] = [parse_value(flag(name)[2:], option.type, word.strip()) for word in words]
        need(len({*values[name]}) == len(words), "grid", text, f"hold each value of {name} once")
    return [dict(zip(values, chosen)) for chosen in product(*values.values())]


def group_of(cls, option):
    """The name of the group of a config class that an option stands in."""
    group, _ = options(cls)[option]
    return group


def name_of(cell):
    """What tables call a cell.

    >>> name_of({"norm": "token", "kl_coef": 0.0})
    'norm=token, kl_coef=0'
    """
    words = []
    for name, value in cell.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(f"{name}={text}")
    return ", ".join(words)


class Plan(NamedTuple):
    """shared, cells: {name of a sub-folder: config of its run}. at: {name of a cell's sub-folder: (number of the cell
    from 0, seed)}."""
    shared: dict
    cells: dict
    at: dict


def planned(cfg, cells, seeds, stages, first_touched, implied, folder):
    """The runs of a grid -> Plan.

    cells: of `read_cells`; stages: those of a run, in order; first_touched(option): the first of them that reads it;
    implied(cell): {option: value} that an option of the cell sets besides, such as the switches of an algorithm.
    """
    touched = {first_touched(name) for cell in cells for name in cell}
    count = min(stages.index(stage) for stage in touched)
    begun = stages[:count]
    single = one_run(cfg)
    given = cfg.run.flags.split()
    plan = Plan({}, {}, {})
    for seed in seeds:
        start = {}
        if begun:
            name = f"shared-seed-{seed}"
            plan.shared[name] = change(single, seed=seed, stage=",".join(begun))
            start = dict(init=str(folder / name / f"{begun[-1]}.pt"), stage=",".join(stages[count:]))
        for number, cell in enumerate(cells):
            besides = {option: value for option, value in implied(cell).items() if option not in given}
            flags = " ".join(sorted({*given, *cell}))
            name = f"cell-{number + 1}-seed-{seed}"
            plan.cells[name] = change(single, **{**besides, **cell, **start, "seed": seed, "flags": flags})
            plan.at[name] = (number, seed)
    return plan
