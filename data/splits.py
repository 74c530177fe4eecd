"""Which split a picture falls in, decided by its pixels, so that the same picture never stands on both sides."""
import hashlib

from data.sample import bands, read_image


def pixel_hash(source):
    """sha256 over the size and the upright RGB pixels; a new name or a lossless re-save does not change it."""
    image = read_image(source)
    digest = hashlib.sha256(f"{image.width}x{image.height} ".encode())
    for _, band in bands(image):            # the bytes of a whole picture would double its memory
        digest.update(band.tobytes())
    return digest.hexdigest()


def mixed(samples):
    """In an order that the ids decide, so that the first of them, whatever their number, are a sample of all."""
    return sorted(samples, key=lambda sample: hashlib.sha256(sample.id.encode(errors="surrogatepass")).digest())


def split_of(key, val_percent):
    """'val' for `val_percent` in a hundred hashes, 'train' for the others; adding pictures moves no earlier one."""
    if not 1 <= val_percent <= 99:
        raise ValueError(f"val_percent {val_percent} must be between 1 and 99: both splits need pictures")
    return "val" if int(key, 16) % 100 < val_percent else "train"


def sides(keys, val_percent):
    """{hash: split} of the pictures of one class, by `split_of`; but of two or more, each split has at least one.

    A split that would have none is given the hash that the nearest other `val_percent` would move there, so that a
    larger one still only adds to val.
    """
    found = {key: split_of(key, val_percent) for key in keys}
    if len(found) > 1 and len(set(found.values())) == 1:
        order = sorted(found, key=lambda key: (int(key, 16) % 100, key))
        if found[order[0]] == "train":
            found[order[0]] = "val"
        else:
            found[order[-1]] = "train"
    return found
