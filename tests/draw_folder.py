"""Draw a folder of pictures, one sub-folder a class, to try `data.images` on something that is not a real data set.

    python tests/draw_folder.py DIR

Six things in random pose, size, colour and perspective on a noisy ground with clutter, stored as files come: JPEG at
any quality or PNG, odd sizes, some grey, some with a palette. The same seed draws the same pictures.
"""
import math
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 256        # a thing is drawn in the unit square on this canvas; warping and shrinking smooth its edges


def points(*pairs):
    return [(x * CANVAS, y * CANVAS) for x, y in pairs]


def box(left, top, right, bottom):
    return [value * CANVAS for value in (left, top, right, bottom)]


def rays(count, outer, inner, turn):
    """The corners of a star: `count` tips at `outer`, notches at `inner`."""
    angles = [turn + math.pi * step / count for step in range(2 * count)]
    radii = [(outer, inner)[step % 2] for step in range(2 * count)]
    return points(*[(0.5 + r * math.sin(a), 0.5 - r * math.cos(a)) for r, a in zip(radii, angles)])


def house(draw, rng, main, second):
    eaves, wide = rng.uniform(0.38, 0.5), rng.uniform(0.26, 0.36)
    draw.rectangle(box(0.5 - wide, eaves, 0.5 + wide, 0.9), main)
    draw.polygon(points((0.42 - wide, eaves), (0.5, rng.uniform(0.06, 0.18)), (0.58 + wide, eaves)), second)
    door = rng.uniform(0.3, 0.6)
    draw.rectangle(box(door, 0.66, door + 0.13, 0.9), second)
    draw.rectangle(box(0.5 - wide + 0.05, eaves + 0.06, 0.5 - wide + 0.17, eaves + 0.17), second)
    draw.rectangle(box(0.5 + wide - 0.17, eaves + 0.06, 0.5 + wide - 0.05, eaves + 0.17), second)


def tree(draw, rng, main, second):
    trunk = rng.uniform(0.04, 0.07)
    draw.rectangle(box(0.5 - trunk, 0.5, 0.5 + trunk, 0.95), second)
    if rng.random() < 0.5:                                              # a fir
        for top, bottom, wide in ((0.04, 0.34, 0.18), (0.2, 0.54, 0.26), (0.38, 0.76, 0.34)):
            draw.polygon(points((0.5, top), (0.5 - wide, bottom), (0.5 + wide, bottom)), main)
    else:                                                               # a leafy one
        for x, y, r in ((0.5, 0.24, 0.2), (0.32, 0.4, 0.18), (0.68, 0.4, 0.18), (0.5, 0.46, 0.19)):
            x, y = x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.04, 0.04)
            draw.ellipse(box(x - r, y - r, x + r, y + r), main)


def fish(draw, rng, main, second):
    tall = rng.uniform(0.15, 0.24)
    draw.polygon(points((0.66, 0.5), (0.95, 0.5 - tall), (0.88, 0.5), (0.95, 0.5 + tall)), second)
    draw.polygon(points((0.35, 0.5 - tall * 0.7), (0.58, 0.42 - tall), (0.6, 0.5)), second)
    draw.ellipse(box(0.05, 0.5 - tall, 0.75, 0.5 + tall), main)
    draw.ellipse(box(0.15, 0.43, 0.22, 0.5), "white")
    draw.ellipse(box(0.17, 0.45, 0.21, 0.49), "black")


def sun(draw, rng, main, second):
    count = rng.randint(9, 14)
    draw.polygon(rays(count, 0.47, 0.3, rng.random()), second)
    draw.ellipse(box(0.23, 0.23, 0.77, 0.77), main)


def boat(draw, rng, main, second):
    mast = rng.uniform(0.44, 0.56)
    draw.polygon(points((0.05, 0.68), (0.95, 0.68), (0.78, 0.9), (0.22, 0.9)), main)
    draw.rectangle(box(mast - 0.015, 0.06, mast + 0.015, 0.68), main)
    draw.polygon(points((mast + 0.03, 0.08), (mast + 0.03, 0.63), (0.9, 0.63)), second)
    draw.polygon(points((mast - 0.03, 0.18), (mast - 0.03, 0.63), (0.16, 0.63)), second)


def star(draw, rng, main, second):
    turn = rng.random()
    draw.polygon(rays(5, 0.48, rng.uniform(0.18, 0.22), turn), main)
    if rng.random() < 0.5:
        draw.polygon(rays(5, 0.26, 0.11, turn), second)


CLASSES = {draw.__name__: draw for draw in (house, tree, fish, sun, boat, star)}


def colours(rng):
    """Ground, main and second colour, far enough apart that they differ in grey as well."""
    dark, light = [rng.randint(0, 90) for _ in range(3)], [rng.randint(165, 255) for _ in range(3)]
    ground, main = (dark, light) if rng.random() < 0.5 else (light, dark)
    second = [min(255, max(0, round(0.6 * a + 0.4 * b) + rng.randint(-40, 40))) for a, b in zip(main, ground)]
    return ground, tuple(main), tuple(second)


def background(rng, noise, colour, width, height):
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    angle = rng.uniform(0, 2 * math.pi)
    slope = rng.uniform(20, 70) * (x * math.cos(angle) + y * math.sin(angle))
    pixels = np.array(colour) + slope[..., None] + noise.normal(0, rng.uniform(2, 14), (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def warped(layer, rng):
    """Mirror, rotate a little and pull the corners about: a mild change of viewpoint, in one resampling."""
    mirror, angle = rng.choice((-1, 1)), math.radians(rng.uniform(-18, 18))
    corners = []
    for x, y in ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5)):      # the order that PIL's QUAD reads
        turned = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
        corners += [0.5 + mirror * turned[0] + rng.uniform(-0.09, 0.09), 0.5 + turned[1] + rng.uniform(-0.09, 0.09)]
    return layer.transform(layer.size, Image.QUAD, [CANVAS * value for value in corners], Image.BILINEAR)


def draw_picture(name, rng, noise):
    width, height = rng.randint(60, 200), rng.randint(60, 200)
    ground, main, second = colours(rng)
    picture = background(rng, noise, ground, width, height)
    clutter = ImageDraw.Draw(picture)
    for _ in range(rng.randint(0, 8)):
        x, y, r = rng.randrange(width), rng.randrange(height), rng.randint(1, 4)
        clutter.ellipse((x - r, y - r, x + r, y + r), rng.choice((main, second)))
    layer = Image.new("RGBA", (CANVAS, CANVAS), main + (0,))            # clear, in the thing's colour: no dark fringe
    CLASSES[name](ImageDraw.Draw(layer), rng, main, second)
    side = round(min(width, height) * rng.uniform(0.6, 0.98))
    layer = warped(layer, rng).resize((side, side), Image.LANCZOS)
    # to_array crops the middle square, so the thing stays inside it.
    slack = (min(width, height) - side) // 2
    left, top = ((total - side) // 2 + rng.randint(-slack, slack) for total in (width, height))
    picture.paste(layer, (left, top), layer)
    return picture


def draw_folder(folder, per_class=80, seed=0):
    """Write `per_class` pictures of each of the six classes to `folder`/<class>/; returns the folder."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    for name in CLASSES:
        place = Path(folder) / name
        place.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            picture = draw_picture(name, rng, noise)
            dress = rng.random()
            if dress < 0.1:
                picture = picture.convert("L")
            if 0.1 < dress < 0.2:
                picture.quantize(rng.choice((16, 64, 256))).save(place / f"{number:03}.png")
            elif dress < 0.6:
                picture.save(place / f"{number:03}.jpg", quality=rng.randint(35, 95))
            else:
                picture.save(place / f"{number:03}.png")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/draw_folder.py DIR")
    draw_folder(sys.argv[1])
    print(f"drew {len(CLASSES)} classes ({', '.join(CLASSES)}) into {sys.argv[1]}")
