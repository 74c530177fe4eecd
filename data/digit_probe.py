"""A linear read-out of digits from an image tower's patch tokens: how much of a drawn monitor it
sees."""
import torch

from data import monitors, scenes
from data.shape_probe import read_out, share_read, tokens_of, with_bias


@torch.no_grad()
def digit_probe(tower, feature_layer, pictures=300):
    """Share of digits that a linear read-out finds in the tower's patch tokens, {split: share} for
    all splits of drawn monitors, each of `pictures` pictures.

    tower: `features(pixels, layer) -> (B, N, D)`, with config.patches, config.image_size and a
    parameter `proj`. Ridge regression on one-hot digits, fitted on as many pictures of the
    validation prompts as of all splits together; the digit's cell is known. Raises ValueError when
    the tower's patches are not the cells of the drawn monitors.
    """
    if tower.config.patches != monitors.CELLS ** 2 or tower.config.image_size != monitors.SIZE:
        raise ValueError("the digit probe needs one patch for each cell of the drawn monitors")
    fitted_on = monitors.load("id", pictures * len(monitors.SPLITS), scenes.TEST_SEED["val"])
    weight = read_out(*_digits(tower, feature_layer, fitted_on), classes=10)
    found = {}
    for split in monitors.SPLITS:
        x, y = _digits(tower, feature_layer, monitors.load(split, pictures, scenes.TEST_SEED["test"]))
        found[split] = share_read(weight, x, y)
    return found


def _digits(tower, feature_layer, samples):
    """The digits of drawn monitors -> (token of the digit's cell and a 1 for the bias, (n, D + 1)
    fp32; the digit, (n,))."""
    tokens = tokens_of(tower, feature_layer, samples)
    x, y = [], []
    for picture, sample in enumerate(samples):
        for cell, digit in digit_cells(sample.caption):
            x.append(tokens[picture, cell])
            y.append(digit)
    return with_bias(x), torch.tensor(y)


def digit_cells(caption):
    """The caption of a drawn monitor -> [(number of the cell in reading order, digit)]; nothing of
    a covered number."""
    found = []
    *rows, _ = caption.split(" , ")
    for row, entry in enumerate(rows, monitors.TRACE_ROWS):
        _, *digits = entry.split()
        if digits == [monitors.HIDDEN]:
            continue
        for column, digit in enumerate(digits, monitors.CELLS - len(digits)):
            found.append((row * monitors.CELLS + column, int(digit)))
    return found
