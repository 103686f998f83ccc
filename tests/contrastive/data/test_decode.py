import io
import os
import struct
import warnings
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.data.decode import Unreadable, read_file, to_rgb, to_square

SIZE = 16
# Four colours, one a quarter: top left, top right, bottom left, bottom right.
COLOURS = [(220, 40, 30), (30, 200, 60), (40, 50, 210), (240, 240, 240)]


def quarters(width=SIZE, height=SIZE, colours=COLOURS):
    pixels = np.zeros((height, width, len(np.atleast_1d(colours[0]))), dtype=np.uint8)
    for index, colour in enumerate(colours):
        rows = slice(None, height // 2) if index < 2 else slice(height // 2, None)
        columns = slice(None, width // 2) if index % 2 == 0 else slice(width // 2, None)
        pixels[rows, columns] = colour
    return pixels


def corners(tensor):
    """The colour in the middle of each quarter, in the order of COLOURS."""
    low, high = SIZE // 4, 3 * SIZE // 4
    return [tuple(tensor[:, y, x].tolist()) for y in (low, high) for x in (low, high)]


def saved(path, image, **options):
    image.save(path, **options)
    return path


def close(found, wanted, tolerance):
    return np.abs(np.array(found) - np.array(wanted)).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("a.png", 0), ("a.bmp", 0), ("a.tif", 0), ("a.ppm", 0), ("a.webp", 12), ("a.jpg", 8)],
)
def test_rgb_files(tmp_path, name, tolerance):
    read = read_file(saved(tmp_path / name, Image.fromarray(quarters()), quality=95), SIZE)
    assert read.dtype == torch.uint8
    assert read.shape == (3, SIZE, SIZE)
    assert read.is_contiguous()
    assert close(corners(read), COLOURS, tolerance)


def test_grey_and_one_bit(tmp_path):
    grey = quarters(colours=[10, 90, 170, 250])[..., 0]
    read = read_file(saved(tmp_path / "l.png", Image.fromarray(grey)), SIZE)
    assert corners(read) == [(v, v, v) for v in (10, 90, 170, 250)]
    bits = Image.fromarray(quarters(colours=[0, 255, 255, 0])[..., 0]).convert("1")
    assert corners(read_file(saved(tmp_path / "1.png", bits), SIZE)) == [(v, v, v) for v in (0, 255, 255, 0)]


def test_palette(tmp_path):
    image = Image.fromarray(quarters()).quantize(8)
    assert image.mode == "P"
    for name in ("p.png", "p.gif"):
        assert close(corners(read_file(saved(tmp_path / name, image), SIZE)), COLOURS, 8)


def test_palette_with_transparency_lies_on_white(tmp_path):
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, SIZE // 2, SIZE))
    read = read_file(saved(tmp_path / "p.png", image, transparency=0), SIZE)
    assert corners(read) == [(255, 255, 255), (0, 0, 255)] * 2


def test_alpha_lies_on_white(tmp_path):
    alpha = quarters(colours=[255, 128, 0, 255])
    read = read_file(
        saved(tmp_path / "a.png", Image.fromarray(np.concatenate([quarters(), alpha], axis=2))), SIZE
    )
    half = tuple(round(c * 128 / 255 + 255 * 127 / 255) for c in COLOURS[1])
    assert close(corners(read), [COLOURS[0], half, (255, 255, 255), COLOURS[3]], 1)
    grey = np.concatenate([quarters(colours=[50] * 4), alpha], axis=2)
    read = read_file(saved(tmp_path / "la.png", Image.frombytes("LA", (SIZE, SIZE), grey.tobytes())), SIZE)
    assert close(corners(read), [(50,) * 3, (152,) * 3, (255,) * 3, (50,) * 3], 1)


@pytest.mark.parametrize("said", [0, 1, 2, None])
def test_a_fourth_channel_of_a_tiff_is_transparency_unless_the_file_says_otherwise(tmp_path, said):
    fourth = quarters(colours=[255, 64, 0, 255])
    image = Image.fromarray(np.concatenate([quarters(), fourth], axis=2))
    path = saved(tmp_path / "a.tif", image)
    entry = struct.pack("<HHLHH", 338, 3, 1, 2, 0)  # ExtraSamples: one, alpha that is not multiplied
    assert path.read_bytes().count(entry) == 1
    other = struct.pack("<HHLHH", 65000 if said is None else 338, 3, 1, said or 0, 0)
    path.write_bytes(path.read_bytes().replace(entry, other))
    second = corners(read_file(path, SIZE))[1]
    if said == 0:
        assert second == COLOURS[1]
    elif said == 1:  # multiplied already: colours of 64 at most, others are clipped
        assert min(second) > 180
    else:
        assert close([second], [tuple(round((c * 64 + 255 * 191) / 255) for c in COLOURS[1])], 1)


def test_cmyk(tmp_path):
    # C, M, Y, none: their light is what the ink does not absorb.
    ink = quarters(colours=[(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 0)])
    image = Image.frombytes("CMYK", (SIZE, SIZE), ink.tobytes())
    wanted = [(0, 255, 255), (255, 0, 255), (255, 255, 0), (255, 255, 255)]
    assert corners(read_file(saved(tmp_path / "c.tif", image), SIZE)) == wanted
    assert close(corners(read_file(saved(tmp_path / "c.jpg", image, quality=100), SIZE)), wanted, 12)


def test_sixteen_bit_grey(tmp_path):
    values = [0, 128 * 257, 65535, 200]  # the last rounds up
    deep = quarters(colours=[0, 1, 2, 3])[..., 0]
    image = Image.fromarray(np.array(values, dtype=np.uint16)[deep])
    for name in ("d.png", "d.tif"):
        read = read_file(saved(tmp_path / name, image), SIZE)
        assert corners(read) == [(v, v, v) for v in (0, 128, 255, 1)]


def test_a_smaller_white(tmp_path):
    """Files of 16 bits from a camera of 12 have 4095 as white; 8-bit files keep their own."""
    deep = quarters(colours=[0, 1, 2, 3])[..., 0]
    twelve = Image.fromarray(np.array([0, 2048, 4095, 5000], dtype=np.uint16)[deep])
    for name in ("d.png", "d.tif"):
        path = saved(tmp_path / name, twelve)
        assert corners(read_file(path, SIZE, 4095)) == [(v, v, v) for v in (0, 128, 255, 255)]
        assert corners(read_file(path, SIZE)) == [(v, v, v) for v in (0, 8, 16, 19)]
    shallow = saved(tmp_path / "l.png", Image.fromarray(quarters()))
    assert torch.equal(read_file(shallow, SIZE, 4095), read_file(shallow, SIZE))


def test_by_default_every_value_of_sixteen_bits_is_scaled_as_before_there_was_a_white():
    values = np.arange(65536)
    image = Image.fromarray(values.astype(np.uint16).reshape(256, 256))
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0].ravel(), (values + 128) // 257)


def test_sixteen_bit_rgb_png(tmp_path):
    """PIL cannot write one, so it is put together here."""
    rows = (quarters().astype(np.uint16) * 257).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    path = tmp_path / "d.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    assert corners(read_file(path, SIZE)) == COLOURS


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = quarters()
    # How a camera stores an upright scene under each orientation (EXIF 2.3, 4.6.4.A).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    read = read_file(saved(tmp_path / "o.jpg", image, exif=exif, quality=95), SIZE)
    assert close(corners(read), COLOURS, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_spoil_the_pixels(tmp_path):
    path = saved(
        tmp_path / "e.jpg",
        Image.fromarray(quarters()),
        exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage",
        quality=95,
    )
    assert close(corners(read_file(path, SIZE)), COLOURS, 8)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert corners(read_file(path, SIZE)) == [(255, 0, 0)] * 4


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (100, 33), (17, 90)])
def test_resized_then_cut_from_the_centre(width, height):
    """Against torch: antialiased bilinear resize of the central square."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = np.asarray(to_square(Image.fromarray(pixels), SIZE)).astype(float)
    side = min(width, height)
    scale = SIZE / side
    wanted = np.zeros((SIZE, SIZE, 3))
    for channel in range(3):
        down = triangle(height, (height - side) / 2, scale)
        across = triangle(width, (width - side) / 2, scale)
        wanted[..., channel] = down @ pixels[..., channel] @ across.T
    assert np.abs(found - wanted).max() <= 1.0  # two roundings to whole grey levels


def triangle(length, start, scale):
    """Weights of the antialiased triangle filter: SIZE outputs over ``length`` inputs from ``start`` on."""
    weights = np.zeros((SIZE, length))
    for out in range(SIZE):
        centre = start + (out + 0.5) / scale
        for index in range(length):
            weights[out, index] = max(0.0, 1 - abs(index + 0.5 - centre) * min(scale, 1.0))
    return weights / weights.sum(axis=1, keepdims=True)


def test_white_noise_is_antialiased():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    small = np.asarray(to_square(Image.fromarray(noise), SIZE)).astype(float)
    assert small.std() < noise.std() / 8  # point sampling would keep all of it


def test_a_large_jpeg_decodes_at_reduced_scale_and_looks_the_same(tmp_path, monkeypatch):
    from PIL import JpegImagePlugin

    smooth = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    path = saved(tmp_path / "l.jpg", smooth.resize((1600, 1200), Image.Resampling.BICUBIC), quality=95)
    quick = read_file(path, 64).int()
    drafted = []
    plain = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile,
        "draft",
        lambda self, mode, size: drafted.append(plain(self, mode, size)),
    )
    read_file(path, 64)
    assert drafted
    assert drafted[0] is not None  # a smaller scale was chosen
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda self, mode, size: None)
    assert (quick - read_file(path, 64).int()).abs().max() <= 4


def test_no_resize_of_the_right_size():
    image = Image.fromarray(quarters())
    assert to_square(image, SIZE) is image


def jpeg_bytes():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


def png_bytes(mode="RGB"):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer, format="PNG")
    return buffer.getvalue()


def flipped_header():
    body = bytearray(png_bytes())
    body[19] ^= 0x01  # the width, which the header's checksum guards
    return bytes(body)


def float_tiff():
    buffer = io.BytesIO()
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(buffer, format="TIFF")
    return buffer.getvalue()


def int_tiff():
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 10**6, dtype=np.int32)).save(buffer, format="TIFF")
    return buffer.getvalue()


BAD = {
    "empty.jpg": (b"", "empty file"),
    "garbage.jpg": (bytes(range(256)) * 9, "not an image"),
    "text.png": (b"<html>404 Not Found</html>", "not an image"),
    "truncated.jpg": (jpeg_bytes()[:-700], "truncated"),
    "header.jpg": (jpeg_bytes()[:40], "."),
    "truncated.png": (png_bytes()[:-3000], "."),
    "flipped.png": (flipped_header(), "."),
    "nothing.ppm": (b"P6\n0 0\n255\n", "."),
    "float.tif": (float_tiff(), "no agreed range"),
    "deep.tif": (int_tiff(), "no agreed range"),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable(tmp_path, name):
    content, reason = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=reason) as caught:
        read_file(path, SIZE)
    assert len(str(caught.value).splitlines()) == 1
    assert "0x" not in str(caught.value)  # no address: the same file gives the same reason in every run


@pytest.mark.parametrize("share", [0.6, 1.5, 3.0])
def test_a_decompression_bomb_is_unreadable_whatever_the_warning_filters(tmp_path, monkeypatch, share):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(SIZE * SIZE / share))
    path = saved(tmp_path / "b.png", Image.fromarray(quarters()))
    if share < 1:
        assert corners(read_file(path, SIZE)) == COLOURS
        return
    with pytest.raises(Unreadable, match="limit of"):
        read_file(path, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Unreadable, match="limit of"):
            read_file(path, SIZE)


def test_missing_folder_and_forbidden_files(tmp_path, monkeypatch):
    with pytest.raises(Unreadable, match="No such file"):
        read_file(tmp_path / "gone.png", SIZE)
    with pytest.raises(Unreadable, match="directory"):
        read_file(tmp_path, SIZE)
    path = saved(tmp_path / "f.png", Image.fromarray(quarters()))
    path.chmod(0)
    if os.geteuid() == 0:  # whom rights do not bind
        forbid = Mock(side_effect=PermissionError(13, "Permission denied"))
        monkeypatch.setattr("builtins.open", forbid)
    with pytest.raises(Unreadable, match="Permission denied"):
        read_file(path, SIZE)
