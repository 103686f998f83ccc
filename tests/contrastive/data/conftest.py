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


@pytest.fixture
def deep(tmp_path):
    """A grey file of 16 bits whose values are those of 12."""
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "a.png")
    return tmp_path
