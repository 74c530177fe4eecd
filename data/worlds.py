"""The worlds of drawn scenes that `--world` names. A new one is a `scenes.World` and a line here."""
from data import scenes

WORLDS = {
    "grid": scenes.GRID,
}
