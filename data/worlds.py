"""The worlds of drawn pictures. One of scenes that `--world` names is a `scenes.World` and a line here."""
from data import long_walks, monitors, scenes, transfer

WORLDS = {
    "grid": scenes.GRID,
    "transfer": transfer.WORLD,
    "long_walks": long_walks.WORLD,
}
DRAWN = ("scenes", "monitors")          # what --data may name without a folder or file


def world_of(data, world):
    """--data and --world -> what is drawn: its splits, parts and teacher, `load` and `pieces`."""
    return monitors.WORLD if data == "monitors" else WORLDS[world]
