"""The worlds of drawn scenes that `--world` names. A new one is a `scenes.World` and a line here."""
from data import long_walks, scenes, transfer

WORLDS = {
    "grid": scenes.GRID,
    "transfer": transfer.WORLD,
    "long_walks": long_walks.WORLD,
}
