import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_image(tmp_path):
    """Write a small image of one colour, that of its number, below tmp_path."""

    def write(name, number=0, size=(8, 8)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), number % 256, dtype=np.uint8)).save(path)
        return path

    return write
