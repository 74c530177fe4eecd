"""What a reward of one's own gets from the worker. How it survives such a reward: tests/test_rewards.py."""
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sample import Sample
from rl import worker
from rl.worker import Worker

MINE = '''
def picture(sample, text):
    """0 unless the pictures are a path, an array and the bytes of a file, as the text says."""
    from io import BytesIO
    from PIL import Image
    path, array, encoded = sample.images
    if path != text or array.shape != (2, 4, 3) or array[1, 2, 0] != 18 or type(encoded) is not bytes:
        return 0
    array[0] = 1
    return Image.open(BytesIO(encoded)).getpixel((3, 1))[2]
'''


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    made = Worker(tmp_path / "mine.py", "picture", timeout=10.0, errors="stop")
    yield made
    made.close()


@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_the_function_sees_pictures_as_paths_arrays_and_bytes(reward, form):
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    sample = Sample(images=("a/b.png", array, file.getvalue()), question="?", answer="two")
    assert reward(sample, "a/b.png") == 23 == array[1, 3, 2] and array[0].max() == 11


@pytest.mark.parametrize("image", ["a/b.png", b"\x00\xff{not JSON}", b"", np.zeros((0, 2, 3), np.uint8)])
def test_a_picture_goes_to_the_worker_and_back_unchanged(image):
    [packed] = worker._plain(Sample(images=(image,)))["images"]
    back = worker._unpacked(packed)
    assert type(back) is type(image) and np.array_equal(back, image) and np.shape(back) == np.shape(image)


def test_a_path_object_goes_as_its_text():
    assert worker._unpacked(worker._packed(Path("a/b.png"))) == str(Path("a/b.png"))
