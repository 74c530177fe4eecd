"""A linear read-out of shapes from an image tower's patch tokens: how much of a drawn scene it
sees."""
import torch

from data import scenes
from data.sample import to_pixels


@torch.no_grad()
def shape_probe(tower, feature_layer, scenes_each=1500):
    """Share of objects whose shape a linear read-out finds in the tower's patch tokens, {"id": ..,
    "pairs": ..}; of "pairs" only the held-out pairs count.

    tower: `features(pixels, layer) -> (B, N, D)`, with config.patches, config.image_size and a
    parameter `proj`. Ridge regression on one-hot shapes, fitted on `scenes_each` scenes of the
    validation prompts; the object's cell is known. Raises ValueError when the tower's patches are
    not the cells of the drawn scenes.
    """
    if tower.config.patches != scenes.CELLS ** 2 or tower.config.image_size != scenes.SIZE:
        raise ValueError("the shape probe needs one patch for each cell of the drawn scenes")
    samples = scenes.load("id", scenes_each, scenes.TEST_SEED["val"])
    weight = read_out(*_objects(tower, feature_layer, samples), classes=len(scenes.SHAPES))
    found = {}
    for split in ("id", "pairs"):
        samples = scenes.load(split, 600, scenes.TEST_SEED["test"])
        x, y = _objects(tower, feature_layer, samples, only_held_out=split == "pairs")
        found[split] = share_read(weight, x, y)
    return found


def read_out(x, y, classes):
    """Ridge regression of one-hot classes: x (n, D) fp32, y (n,) -> weight (D, classes)."""
    target = torch.nn.functional.one_hot(y, classes).float()
    ridge = 1e-2 * len(x) * torch.eye(x.shape[1]) * x.var(0).mean()
    return torch.linalg.solve(x.T @ x + ridge, x.T @ target)


def tokens_of(tower, feature_layer, samples):
    """Samples of one picture each -> the tower's patch tokens, (B, N, D) fp32 on the CPU."""
    tokens = []
    for first in range(0, len(samples), 256):
        images = [sample.images[0] for sample in samples[first:first + 256]]
        pixels = to_pixels(images, tower.config.image_size).to(tower.proj)
        tokens.append(tower.features(pixels, feature_layer))
    return torch.cat(tokens).float().cpu()


def with_bias(rows):
    """n tokens (D,) -> (n, D + 1), with a 1 for the bias."""
    x = torch.stack(rows)
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def share_read(weight, x, y):
    """Share of the rows of x whose class y the weight of a read-out finds."""
    return float(((x @ weight).argmax(1) == y).float().mean())


def _objects(tower, feature_layer, samples, only_held_out=False):
    """The objects of drawn scenes -> (token of the object's cell and a 1 for the bias, (n, D + 1)
    fp32; number of its shape, (n,))."""
    tokens = tokens_of(tower, feature_layer, samples)
    x, y = [], []
    for row, sample in enumerate(samples):
        for entry in sample.caption.split(" , "):
            cell, color, shape = entry.split()
            if only_held_out and (color, shape) not in scenes.HELD_OUT:
                continue
            patch = (int(cell[1]) - 1) * scenes.CELLS + "abcd".index(cell[0])
            x.append(tokens[row, patch])
            y.append(scenes.SHAPES.index(shape))
    return with_bias(x), torch.tensor(y)
