"""Groups of options <-> command line <-> JSON. Imports nothing of ours, so that every folder may describe its options.

A group is a frozen dataclass beside the code that reads it, and checks itself; the comment behind a field is its help:

    @dataclass(frozen=True)
    class OptimOptions:
        warmup: float = number(0.05, "[0, 1]")              # share of the steps
        moments: str = choice("float32", "bfloat16")        # of AdamW, for bfloat16 weights

        def __post_init__(self):
            check_fields(self)

A config is a frozen dataclass of groups. Names of fields are unique over its groups, so that flags, presets and saved
configs are flat:

    @dataclass(frozen=True)
    class Config:
        optim: OptimOptions = OptimOptions()

    config = from_command_line(Config, presets, argv, doc)      # --warmup=0.1 or --warmup 0.1
    config.optim.warmup
    change(config, warmup=0.2)
"""
import argparse
import difflib
import inspect
import re
from dataclasses import field, fields, is_dataclass, replace
from functools import cache


def number(default, interval):
    """A field whose values lie in an interval as mathematics writes it: "(0, 1]" leaves 0 out."""
    return field(default=default, metadata=dict(interval=interval))


def choice(default, *others):
    """A field that is `default` or one of `others`."""
    return field(default=default, metadata=dict(allowed=tuple(dict.fromkeys((default, *others)))))


def inside(value, interval):
    """Whether a number lies in an interval.

    >>> inside(1, "[0, 1]"), inside(0.0, "(0, 1]"), inside(float("inf"), "[0, 1e9]")
    (True, False, False)
    """
    least, most = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= least if interval[0] == "[" else value > least
    below = value <= most if interval[-1] == "]" else value < most
    return above and below


def flag(name):
    """Field name -> how it is written on the command line."""
    return "--" + name.replace("_", "-")


def need(ok, name, value, expected):
    """Raises ValueError in one sentence about the option `name` unless ok."""
    if not ok:
        raise ValueError(f"{flag(name)}={value} must {expected}")


def first_line(error, silent=""):
    """What an error says, for a message of one sentence: its first line; of one that says nothing `silent`, else its
    class."""
    text = str(error).strip() or silent or type(error).__name__
    return text.splitlines()[0]


def check_fields(group):
    """Raises ValueError in one sentence about the first field of a group that lies outside its range or choices."""
    for option in fields(group):
        value = getattr(group, option.name)
        interval = option.metadata.get("interval")
        allowed = option.metadata.get("allowed")
        if interval:
            need(inside(value, interval), option.name, value, f"lie in {interval}")
        if allowed:
            words = ", ".join(word for word in allowed if word)
            need(value in allowed, option.name, value, f"be one of {words}")


# ---------------------------------------------------------------- a config of groups and its flat names

@cache
def options(cls):
    """Flat name -> (name of the group, field) of a config class. Raises ValueError when two groups share a name."""
    found = {}
    for group in fields(cls):
        for option in fields(group.type):
            if option.name in found:
                raise ValueError(f"option {option.name!r} stands in the groups {found[option.name][0]} and "
                                 f"{group.name}; expected one")
            found[option.name] = (group.name, option)
    return found


def get(config, name):
    """The value of the option `name`, whatever its group."""
    group, _ = options(type(config))[name]
    return getattr(getattr(config, group), name)


def flat(config):
    """config -> {option: value}, as it is saved."""
    return {name: get(config, name) for name in options(type(config))}


def change(config, **values):
    """config with other values of some options. Raises ValueError on values that their groups refuse."""
    by_group = {}
    for name, value in values.items():
        group, _ = options(type(config))[name]
        by_group.setdefault(group, {})[name] = value
    groups = {name: replace(getattr(config, name), **of_group) for name, of_group in by_group.items()}
    return replace(config, **groups)


def from_flat(cls, values):
    """{option: value} -> config. Options that it does not know, as other versions wrote them, are left out."""
    return change(cls(), **{name: value for name, value in values.items() if name in options(cls)})


def changed(config):
    """{option: value} of those that differ from their defaults."""
    defaults = {name: option.default for name, (_, option) in options(type(config)).items()}
    return {name: value for name, value in flat(config).items() if value != defaults[name]}


# ---------------------------------------------------------------- the command line

@cache
def comments(cls):
    """Field name -> the comment on its line, of a group or of all groups of a config."""
    found = {}
    for group in [cls, *(f.type for f in fields(cls) if is_dataclass(f.type))]:
        found |= dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(group), flags=re.M))
    return found


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
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"--{name}={text} must be {wanted}") from None
    if kind is float and value != value:
        raise ValueError(f"--{name}={text} must be a number")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def _parser(cls, doc):
    """The parser of a config's flags, by groups."""
    parser = _Parser(usage="%(prog)s [--name=value ...]", description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    help_texts = comments(cls)
    for group in fields(cls):
        summary = (group.type.__doc__ or "").strip().splitlines()[0]
        section = parser.add_argument_group(f"{group.name}: {summary}")
        for option in fields(group.type):
            text = f"{help_texts.get(option.name, '')} [{option.default}]".replace("%", "%%")
            values = option.type.__name__.upper()
            if "allowed" in option.metadata:
                values = " | ".join(word for word in option.metadata["allowed"] if word)
            # --resume means --resume=True
            alone = dict(nargs="?", const="True") if option.type is bool else {}
            section.add_argument(flag(option.name), dest=option.name, help=text, metavar=values, **alone)
    return parser


def with_dashes(word):
    """--max_new=3 -> --max-new=3"""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _check_names(cls, argv):
    """Raises ValueError on a flag that the config does not have, with the nearest one that it has."""
    known = [flag(name)[2:] for name in options(cls)]
    for word in argv:
        name = word.lstrip("-").split("=")[0]
        if word.startswith("--") and name not in known and name != "help":
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists all options"
            raise ValueError(f"unknown option --{name}; {hint}")


def given_flags(cls, argv, doc):
    """argv -> {option: value} of the flags in it. Raises ValueError on anything that it does not understand."""
    argv = [with_dashes(word) for word in argv]
    _check_names(cls, argv)
    known, rest = _parser(cls, doc).parse_known_args(argv)
    if rest:
        raise ValueError(f"{rest[0]!r} is not an option; options look like --name=value")
    given = {}
    for name, (_, option) in options(cls).items():
        text = getattr(known, name)
        if text is not None:
            given[name] = parse_value(flag(name)[2:], option.type, text)
    return given


def from_command_line(cls, presets, argv, doc, saved=lambda given: None, more=lambda given: {}):
    """argv -> config: the defaults, under the preset's values, under those that `more` has for the flags given, under
    the flags given.

    `presets`: name -> {option: value}, or under "" a function of the flags given that returns the preset's name.
    `saved`: of the flags given -> the {option: value} of an earlier config that takes the place of preset and defaults,
    or None. Raises ValueError on anything it does not understand, with the nearest name it knows.
    """
    given = given_flags(cls, argv, doc)
    earlier = saved(given)
    if earlier is not None:
        check_types(cls, earlier, "the config.json of the run that --resume goes on with")
        return from_flat(cls, earlier | given)
    if "preset" not in options(cls):
        return from_flat(cls, given)
    preset = given.get("preset") or presets[""](given)
    if preset not in presets or not preset:
        names = ", ".join(name for name in presets if name)
        raise ValueError(f"--preset={preset} must be one of {names}")
    if "flags" in options(cls):
        given.setdefault("flags", " ".join(sorted(given)))
    return change(cls(), **{**presets[preset], "preset": preset, **more(given), **given})


def check_types(cls, values, where):
    """Raises ValueError when one of `values` (option -> value) is of another type than the option's; where: what holds
    them, for the message."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    for name, (_, option) in options(cls).items():
        value = values.get(name, option.default)
        allowed = (int, float) if option.type is float else (option.type,)
        if type(value) not in allowed:
            raise ValueError(f"{where} has {name}={value!r}; expected {words[option.type]}")


def to_command_line(config):
    """The flags that make this config again, presets left out of play by naming every option."""
    return [f"{flag(name)}={value}" for name, value in flat(config).items()]


def describe(config, width=110):
    """What differs from the defaults, on as few lines as fit."""
    words = []
    for name, value in changed(config).items():
        if value != "" and name != "flags":         # which only repeats names of the others
            words.append(f"{name}={value}")
    if not words:
        return "config: all defaults"
    lines = ["config, what differs from the defaults (config.json has the rest):", " "]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append(" ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def adopt(config, saved, names, who):
    """config with the options `names` as in the dict `saved`, and a list of one note on those that were otherwise;
    who: the flag that decided it."""
    other = {name: saved[name] for name in names if name in saved and saved[name] != get(config, name)}
    if not other:
        return config, []
    words = ", ".join(f"{name}={value}, not {get(config, name)}" for name, value in other.items())
    return change(config, **other), [f"{who} decides the model's shape: {words}"]
