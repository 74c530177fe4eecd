"""A frozen dataclass <-> command line <-> JSON. The comment behind a field is its help text.

    @dataclass(frozen=True)
    class Config:
        lr: float = 1e-3        # learning rate

    config = from_command_line(Config, presets, argv)      # --lr=3e-4 or --lr 3e-4
"""
import argparse
import difflib
import inspect
import re
from dataclasses import fields, replace
from functools import cache


@cache
def comments(cls):
    """Field name -> the comment on its line."""
    found = re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(cls), flags=re.M)
    return dict(found)


def parse_value(name, kind, text):
    """Text -> value of type `kind`; raises ValueError naming field, value and expectation."""
    if kind is bool:
        if text.lower() in ("true", "yes", "1"):
            return True
        if text.lower() in ("false", "no", "0"):
            return False
        raise ValueError(f"--{name}={text} must be True or False")
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"--{name}={text} must be {'a whole number' if kind is int else 'a number'}") from None
    if kind is float and value != value:
        raise ValueError(f"--{name}={text} must be a number")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def from_command_line(cls, presets, argv, doc, saved=lambda given: None, more=lambda given: {}):
    """argv -> config: the dataclass's defaults, under the preset's overrides, under those that `more` has for the flags
    given, under the flags given.

    `presets`: name -> dict of overrides, or a function of the flags given that returns the preset's name under "".
    `saved`: of the flags given -> the fields of an earlier config that take the place of preset and defaults, or None.
    Raises ValueError on anything it does not understand, with the nearest name it knows.
    """
    help_text = comments(cls)
    flag = {field.name.replace("_", "-"): field for field in fields(cls)}
    parser = _Parser(usage="%(prog)s [--name=value ...]", description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, field in flag.items():
        text = f"{help_text.get(field.name, '')} [{field.default}]".replace("%", "%%")
        alone = dict(nargs="?", const="True") if field.type is bool else {}      # --resume means --resume=True
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{field.name}")), dest=field.name, help=text,
                            metavar=field.type.__name__.upper(), **alone)
    for word in argv:
        name = word.lstrip("-").split("=")[0].replace("_", "-")
        if word.startswith("--") and name not in flag and name != "help":
            near = difflib.get_close_matches(name, flag, n=1)
            hint = f"; did you mean --{near[0]}?" if near else "; --help lists them all"
            raise ValueError(f"unknown option --{name}{hint}")
    known, rest = parser.parse_known_args(argv)
    if rest:
        raise ValueError(f"{rest[0]!r} is not an option; options look like --name=value")
    given = {name: parse_value(name.replace("_", "-"), cls.__dataclass_fields__[name].type, text)
             for name, text in vars(known).items() if text is not None}
    earlier = saved(given)
    if earlier is not None:
        check_types(cls, earlier, "the config.json of the run that --resume goes on with")
        return replace(cls(), **{name: earlier[name] for name in cls.__dataclass_fields__ if name in earlier} | given)
    preset = given.get("preset") or presets[""](given)
    if "flags" in cls.__dataclass_fields__:
        given.setdefault("flags", " ".join(sorted(given)))
    if preset not in presets or not preset:
        names = ", ".join(name for name in presets if name)
        raise ValueError(f"--preset={preset} must be one of {names}")
    return replace(cls(), **{**presets[preset], "preset": preset, **more(given), **given})


def check_types(cls, values, where):
    """Raises ValueError when one of `values` (name -> value) is of another type than the field of `cls`; where: what
    holds them, for the message."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    for field in fields(cls):
        value = values.get(field.name, field.default)
        allowed = (int, float) if field.type is float else (field.type,)
        if type(value) not in allowed:
            raise ValueError(f"{where} has {field.name}={value!r}; expected {words[field.type]}")


def adopt(config, saved, names, who):
    """config with the fields `names` as in the dict `saved`, and a list of one note on those that were otherwise; who:
    the flag that decided it."""
    other = {name: saved[name] for name in names if name in saved and saved[name] != getattr(config, name)}
    said = ", ".join(f"{name}={value}, not {getattr(config, name)}" for name, value in other.items())
    return replace(config, **other), [f"{who} decides the model's shape: {said}"] if other else []


def needs(config):
    """need(ok, name, expected): raises ValueError in one sentence about the field `name` unless ok."""
    def need(ok, name, expected):
        if not ok:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(config, name)} must {expected}")

    return need


def inside(value, interval):
    """Whether a number lies in an interval as mathematics writes it: a round bracket leaves its bound out.

    >>> inside(1, "[0, 1]"), inside(0.0, "(0, 1]"), inside(float("inf"), "[0, 1e9]")
    (True, False, False)
    """
    least, most = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= least if interval[0] == "[" else value > least
    below = value <= most if interval[-1] == "]" else value < most
    return above and below


def check_ranges(config, ranges, one_of):
    """ranges: {interval: names of number fields, in one string}; one_of: {name: allowed values}. Raises ValueError in
    one sentence about the first field outside."""
    need = needs(config)
    for interval, names in ranges.items():
        for name in names.split():
            need(inside(getattr(config, name), interval), name, f"lie in {interval}")
    for name, allowed in one_of.items():
        need(getattr(config, name) in allowed, name, f"be one of {', '.join(a for a in allowed if a)}")


def to_command_line(config):
    """The flags that make this config again, presets left out of play by naming every field."""
    return [f"--{field.name.replace('_', '-')}={getattr(config, field.name)}" for field in fields(config)]


def describe(config, width=110):
    """All fields on as few lines as fit; those that differ from the default are marked."""
    words = [f"{'*' if value != field.default else ''}{field.name}={value}" for field in fields(config)
             if (value := getattr(config, field.name)) != ""]
    lines = ["config (* differs from the default):", " "]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append(" ")
        lines[-1] += f" {word} "
    return "\n".join(lines)
