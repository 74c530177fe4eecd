"""The two types of the data side: Sample (what a source yields) and Batch (what a model takes).

Absent means empty: a Sample without a picture has `images == ()`, a Batch without targets has an
all-False `target`.
"""
import hashlib
import io
import math
import os
import stat
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

# OpenAI's channel statistics: what CLIP's towers expect. Other towers pass their own (SigLIP: 0.5
# everywhere).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Sample:
    """A question about pictures (as a rule one), whatever the source.

    `answer` is the gold answer; `conclusion` is what the teacher concluded, right or wrong, after
    `reasoning`. A picture is a file path (str), the bytes of an encoded picture (PNG, JPEG, WebP,
    ..: what a row of a parquet file holds) or an (H, W, 3) uint8 array.
    """
    id: str = ""
    images: tuple = ()          # paths, bytes or arrays
    turns: tuple = ()           # earlier (question, answer) pairs of a conversation
    question: str = ""
    answer: str = ""
    caption: str = ""
    summary: str = ""
    reasoning: str = ""
    conclusion: str = ""
    choices: tuple = ()
    aliases: tuple = ()         # other spellings of `answer` that count as right
    decoy: str = ""             # right without the rule that the question states; never counted
    tolerance: float = 0.0
    unit: str = ""
    boxes: tuple = ()
    split: str = ""             # train, val, id, crowded, ...
    source: str = ""            # where it comes from and its kind, "scenes/walk2"
    number: int = field(default=-1, compare=False, repr=False)      # which record of its file


@dataclass
class Batch:
    """P prompts of at most T tokens, right-padded, with the I pictures they hold, in reading order.

    ids         (P, T) int64, `image_id` at the N positions of each picture
    length      (P,) int64
    target      (P, T) bool, True on the tokens that a supervised loss predicts
    pixels      (I, 3, S, S) float32
    image_row   (I,) int64, the prompt that a picture belongs to
    features    (I, N, Dv), the encoded pictures; empty until `VLM.encode` fills it
    """
    ids: torch.Tensor
    length: torch.Tensor
    target: torch.Tensor
    pixels: torch.Tensor
    image_row: torch.Tensor
    features: torch.Tensor

    def to(self, device):
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def rows(self, index):
        """The sub-batch of the prompts `index` (a 1-d int tensor on the batch's device), with their
        pictures. Cut to the longest of them: padding costs as much as tokens do.
        """
        longest = int(self.length[index].max()) if len(index) else 0
        # A picture follows its prompt: for each chosen prompt, in order, its pictures in order.
        belongs = self.image_row[None] == index[:, None]                  # (rows, I)
        new_row, picture = belongs.nonzero(as_tuple=True)
        features = self.features
        if len(features):
            features = features[picture]
        return Batch(ids=self.ids[index, :longest], length=self.length[index],
                     target=self.target[index, :longest], pixels=self.pixels[picture],
                     image_row=new_row, features=features)

    @staticmethod
    def join(batches):
        """Batches one after the other, as one. Filled up with id 0: padding changes nothing."""
        longest = max(batch.ids.shape[1] for batch in batches)
        encoded = [batch.features for batch in batches if len(batch.features)]
        ids, target, image_row = [], [], []
        rows = 0
        for batch in batches:
            short = longest - batch.ids.shape[1]
            ids.append(F.pad(batch.ids, (0, short)))
            target.append(F.pad(batch.target, (0, short)))
            image_row.append(batch.image_row + rows)
            rows += len(batch.ids)
        return Batch(ids=torch.cat(ids),
                     length=torch.cat([batch.length for batch in batches]),
                     target=torch.cat(target),
                     pixels=torch.cat([batch.pixels for batch in batches]),
                     image_row=torch.cat(image_row),
                     features=torch.cat(encoded) if encoded else batches[0].features)

    def micro_batches(self, size):
        """Consecutive sub-batches of `size` prompts (0: all at once)."""
        size = size or len(self.ids)
        every_row = torch.arange(len(self.ids), device=self.ids.device)
        return [self.rows(rows) for rows in every_row.split(size)]


# ---------------------------------------------------------------- reading a picture

# PIL refuses more than 178,956,970 pixels by the file's header, which bounds what one file can
# take: 8 bytes a pixel here. From half of them on it warns of what it reads all the same.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
BAND = 2 ** 20              # pixels converted at once


def picture_name(source):
    """What an error calls a picture: its path, the number of its bytes, or "given as an array"."""
    if isinstance(source, np.ndarray):
        return "given as an array"
    if isinstance(source, bytes):
        return f"of {len(source)} bytes"
    return repr(str(source))


def read_image(source):
    """A picture (path, encoded bytes or (H, W, 3) uint8 array) -> PIL image in RGB, upright (EXIF),
    alpha on white, any palette or grey expanded.

    Raises ValueError naming the file when it cannot be read as a picture, is no regular file or has
    too many pixels.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    name = picture_name(source)
    try:
        if isinstance(source, bytes):
            return _decoded(io.BytesIO(source))
        kind = os.stat(source).st_mode
        if stat.S_ISDIR(kind):
            raise ValueError("it is a folder")
        if not stat.S_ISREG(kind):          # opening a pipe would wait for a writer
            raise ValueError("it is no regular file")
        return _decoded(source)
    except FileNotFoundError:
        raise ValueError(f"image {name} does not exist") from None
    except Image.DecompressionBombError:
        raise ValueError(f"image {name} has too many pixels: expected at most "
                         f"{2 * Image.MAX_IMAGE_PIXELS}") from None
    except UnidentifiedImageError:          # PIL's own message names an object in memory
        raise ValueError(f"image {name} cannot be read as a picture: it has no format that Pillow "
                         "knows") from None
    except Exception as error:
        # On odd bytes PIL's readers raise OSError, SyntaxError, struct.error and more.
        raise ValueError(f"image {name} cannot be read as a picture: {error}") from None


def _decoded(file):
    """A path or an open file -> PIL image in RGB, upright."""
    with Image.open(file) as image:
        if not image.width * image.height:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return _rgb(image)


def bands(image):
    """PIL image -> (top, the rows from `top` on), in bands of at most `BAND` pixels, in order."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _rgb(image):
    """Decoded PIL image of any mode -> RGB, by bands: copies of a whole scan of 13,000 x 13,000
    pixels would take 4 GB."""
    clear = "transparency" in image.info
    if image.mode == "RGB" and not clear:
        return image
    deep = image.mode.startswith("I") or image.mode == "F"
    if deep:
        low, span = _grey_range(image)
    picture = Image.new("RGB", image.size)
    for top, band in bands(image):
        if deep:
            # PIL clips 16-bit grey at 255 on conversion; stretch the picture's own range instead.
            grey = np.asarray(band, dtype=np.float64)
            band = Image.fromarray(((grey - low) / span * 255).astype(np.uint8))
        elif clear or band.mode in ("RGBA", "LA", "PA"):
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        picture.paste(band.convert("RGB"), (0, top))
    return picture


def _grey_range(image):
    """(lowest value, distance to the highest, more than 0) of an image of one channel; ValueError
    unless finite."""
    greys = [np.asarray(band) for _, band in bands(image)]
    low = float(np.min([grey.min() for grey in greys]))
    span = float(np.max([grey.max() for grey in greys])) - low
    if not math.isfinite(span):
        raise ValueError("it has pixels that are no finite numbers")
    return low, max(span, 1e-12)


# ---------------------------------------------------------------- from a picture to pixels

# (picture, size, fit, mean) -> array. Decoding a photograph takes longer than training on it, and
# every epoch asks for it again. Nothing is thrown out: epochs visit all pictures alike, so those
# that do not fit would be read anyway.
CACHE = {}
CACHE_BYTES = 2 ** 29
FITS = ("crop", "pad")
MOST_PIXELS = 2 ** 28       # 1 GiB inside PIL, four bytes a pixel; one odd file must not take more


def to_array(source, size, fit="crop", mean=CLIP_MEAN):
    """A picture (path, encoded bytes or (H, W, 3) uint8 array) -> (size, size, 3) uint8.

    "crop", as CLIP and LLaVA's stage 1 see a picture: the short edge resized to `size` (bicubic),
    the middle square cut out. "pad", as LLaVA-1.5's stage 2 and its evaluation see it: the whole
    picture in the middle of a square of the colour `mean` (per channel, 0 to 1), resized. A (size,
    size, 3) array is returned as it is. Raises ValueError for another fit, and naming the file for
    what is no picture.
    """
    if fit not in FITS:
        raise ValueError(f"fit {fit!r} must be one of {', '.join(map(repr, FITS))}")
    if isinstance(source, np.ndarray):
        if source.shape == (size, size, 3):
            return source
        return _fitted(source, size, fit, mean)
    if not isinstance(source, bytes) and not os.path.exists(source):
        return _fitted(source, size, fit, mean)         # raises: it names what is wrong
    key = _cache_key(source), size, fit, tuple(mean)
    if key not in CACHE:
        array = _fitted(source, size, fit, mean)
        array.flags.writeable = False
        if (len(CACHE) + 1) * array.nbytes > CACHE_BYTES:
            return array
        CACHE[key] = array
    return CACHE[key]


def _cache_key(source):
    """What tells a picture apart: of a file path and time of change, of bytes their digest.

    A digest costs a small part of decoding, equal pictures of a data set share one entry, and the
    cache keeps no bytes alive that its caller has let go of.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    return source, os.stat(source).st_mtime_ns


def _fitted(source, size, fit, mean):
    """A picture -> (size, size, 3) uint8, bitwise identical to transformers' CLIPImageProcessor."""
    image = read_image(source)
    width, height = image.size
    short = min(image.size)
    long = max(image.size)
    if fit == "pad":
        pixels = long * long
    else:
        pixels = size * size * long // short
    if pixels > MOST_PIXELS:
        raise ValueError(f"image {picture_name(source)} of {width} x {height} pixels is too long "
                         f"and narrow to {fit}: expected at most {MOST_PIXELS} pixels on the way "
                         f"to {size} x {size}")
    if fit == "pad":
        square = Image.new("RGB", (long, long), tuple(int(channel * 255) for channel in mean))
        square.paste(image, ((long - width) // 2, (long - height) // 2))
        return np.array(square.resize((size, size), Image.BICUBIC))
    # Cut off, not rounded: one column more or less moves the crop, and every pixel is interpolated
    # anew.
    new_width = size if width == short else int(size * width / short)
    new_height = size if height == short else int(size * height / short)
    image = image.resize((new_width, new_height), Image.BICUBIC)
    left = (new_width - size) // 2
    top = (new_height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def to_pixels(images, size, fit="crop", mean=CLIP_MEAN, std=CLIP_STD):
    """List of I pictures -> (I, 3, size, size) float32, fitted as `to_array` does, then
    (x / 255 - mean) / std."""
    if not images:
        return torch.zeros(0, 3, size, size)
    stack = torch.from_numpy(np.stack([to_array(image, size, fit, mean) for image in images]))
    pixels = (stack.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return pixels.permute(0, 3, 1, 2).contiguous()


def collate(rows, pad_id, image_size, fit="crop", mean=CLIP_MEAN, std=CLIP_STD):
    """List of (ids, target mask, images) -> Batch, right-padded with `pad_id`; pictures as
    `to_pixels` makes them.

    >>> batch = collate([([1, 5, 6], [0, 0, 1], ()), ([1], [0], ())], pad_id=0, image_size=8)
    >>> batch.ids.tolist(), batch.length.tolist()
    ([[1, 5, 6], [1, 0, 0]], [3, 1])
    """
    width = max(len(tokens) for tokens, _, _ in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    target = torch.zeros(len(rows), width, dtype=torch.bool)
    pictures, picture_rows = [], []
    for row, (tokens, mask, images) in enumerate(rows):
        ids[row, :len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        target[row, :len(mask)] = torch.tensor(mask, dtype=torch.bool)
        pictures += images
        picture_rows += [row] * len(images)
    return Batch(ids=ids,
                 length=torch.tensor([len(tokens) for tokens, _, _ in rows]),
                 target=target,
                 pixels=to_pixels(pictures, image_size, fit, mean, std),
                 image_row=torch.tensor(picture_rows, dtype=torch.long),
                 features=torch.zeros(0))


# ---------------------------------------------------------------- the order of training

GROUPED = 50  # steps that trade records: enough to find like lengths, few enough to stay random


def batch_indices(count, size, step, seed, lengths=None):
    """Indices of step `step`: epochs of a seeded order of `count` records, cut into steps of
    `size`.

    A function of its arguments alone, so a resumed run reads on where it stopped without saved
    state.

    >>> [i for step in range(3) for i in batch_indices(5, 2, step, seed=0)][:5] != [0, 1, 2, 3, 4]
    True

    With `lengths` (count,), in any unit, records of like length share a step, so that little of it
    is padding: up to `GROUPED` steps in a row (never across an epoch's end) pool their records,
    sort them by length, cut them into steps anew, and take these steps in random order. An epoch
    still visits each record once. This is the length grouping of transformers' Trainer; LLaVA's own
    also keeps steps with and without pictures apart. Raises ValueError when there is not one length
    a record.
    """
    if lengths is None:
        return _in_order(count, size, step * size, seed)
    if np.shape(lengths) != (count,):
        raise ValueError(f"lengths of shape {np.shape(lengths)} must be ({count},), one for each record")
    epoch_steps = max(count // size, 1)
    epoch, at = divmod(step, epoch_steps)
    first = at // GROUPED * GROUPED                 # of the group, counted in its epoch
    group = min(GROUPED, epoch_steps - first)
    first += epoch * epoch_steps                    # counted from the first step of all
    taken = np.array(_in_order(count, group * size, first * size, seed))
    by_length = np.argsort(np.asarray(lengths)[taken], kind="stable")
    steps = taken[by_length].reshape(group, size)
    # The 1 keeps this draw apart from the epochs' own: numpy gives [seed, 0, 0] the stream of
    # [seed, 0].
    order = np.random.default_rng([seed, first, 1]).permutation(group)
    return steps[order[step - first]].tolist()


def _in_order(count, size, start, seed):
    """`size` indices from place `start` of the endless row of epochs, each in a seeded order of its
    own."""
    epoch, at = divmod(start, count)
    taken = []
    while len(taken) < size:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        taken += order[at:at + size - len(taken)].tolist()
        epoch += 1
        at = 0
    return taken
