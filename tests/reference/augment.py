"""Compute augmentations by plain loops over numbers, from their papers and definitions."""

import colorsys
import math

import numpy as np

LUMA = (0.2989, 0.587, 0.114)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute Philox-4x32-10 (Salmon et al. 2011) in Python integers."""
    word = 2**32
    for round_ in range(10):
        k0, k1 = (key[0] + round_ * 0x9E3779B9) % word, (key[1] + round_ * 0xBB67AE85) % word
        high0, low0 = divmod(counter[0] * 0xD2511F53, word)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, word)
        counter = [high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0]
    return counter


def uniforms(seed: int, epoch: int, row: int, view: int, count: int) -> list[float]:
    found: list[float] = []
    for block in range(-(-count // 4)):
        words = philox([row % 2**32, (row >> 32) % 2**32, view, block], [seed, epoch])
        found += [(word >> 8) / 2**24 for word in words]
    return found[:count]


def crop_resize(image: np.ndarray, box: tuple[int, int, int, int], flip: bool, size: int) -> np.ndarray:
    """Resize a box of a (c, h, w) image pixel by pixel, with a triangle filter as wide as the shrinkage."""
    left, top, width, height = box
    crop = image[:, top : top + height, left : left + width].astype(np.float64)
    out = np.zeros((len(image), size, size))
    for row in range(size):
        rows = _taps((row + 0.5) * height / size, max(1.0, height / size), height)
        for column in range(size):
            columns = _taps((column + 0.5) * width / size, max(1.0, width / size), width)
            value = sum(wr * wc * crop[:, r, c] for r, wr in rows for c, wc in columns)
            out[:, row, size - 1 - column if flip else column] = value
    return out


def _taps(centre: float, reach: float, pixels: int) -> list[tuple[int, float]]:
    taps = [(i, 1 - abs(i + 0.5 - centre) / reach) for i in range(pixels)]
    taps = [(i, weight) for i, weight in taps if weight > 0]
    total = sum(weight for _, weight in taps)
    return [(i, weight / total) for i, weight in taps]


def move(image: np.ndarray, angle: float, shift: tuple[float, float], shear: float) -> np.ndarray:
    """Shear a square image along x, rotate it clockwise as displayed and shift it; bilinear, 0 outside.

    ``angle`` and ``shear`` in radians, ``shift`` as a share of the side.
    """
    size = image.shape[-1]
    forward = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = forward @ np.array([[1, -math.tan(shear)], [0, 1]])
    middle = (size - 1) / 2
    out = np.zeros(image.shape)
    for row in range(size):
        for column in range(size):
            place = np.array([column, row]) - middle - np.array(shift) * size
            x, y = np.linalg.solve(forward, place) + middle
            out[:, row, column] = _bilinear(image, x, y)
    return out


def _bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    total = np.zeros(len(image))
    for column in (math.floor(x), math.floor(x) + 1):
        for row in (math.floor(y), math.floor(y) + 1):
            if 0 <= column < image.shape[2] and 0 <= row < image.shape[1]:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * image[:, row, column]
    return total


def jitter(
    image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float
) -> np.ndarray:
    """Change brightness, contrast, saturation, hue of a (3, h, w) image in [0, 1]; clamp after each."""
    image = np.clip(image.astype(np.float64) * brightness, 0, 1)
    mean = np.mean([_grey(image[:, r, c]) for r in range(image.shape[1]) for c in range(image.shape[2])])
    image = np.clip(contrast * image + (1 - contrast) * mean, 0, 1)
    out = np.zeros_like(image)
    for r in range(image.shape[1]):
        for c in range(image.shape[2]):
            pixel = saturation * image[:, r, c] + (1 - saturation) * _grey(image[:, r, c])
            h, s, v = colorsys.rgb_to_hsv(*np.clip(pixel, 0, 1))
            out[:, r, c] = colorsys.hsv_to_rgb((h + hue) % 1.0, s, v)
    return out


def _grey(pixel: np.ndarray) -> float:
    return float(sum(weight * value for weight, value in zip(LUMA, pixel, strict=True)))


def blur(image: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Blur a (c, h, w) image with a Gaussian; borders reflect without repeating the outermost pixel."""
    padded = np.pad(image.astype(np.float64), ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    taps = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    total = sum(taps) ** 2
    out = np.zeros(image.shape)
    for i, down in enumerate(taps):
        for j, across in enumerate(taps):
            out += down * across / total * padded[:, i : i + image.shape[1], j : j + image.shape[2]]
    return out
