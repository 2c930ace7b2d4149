"""Pixels: against Pillow used directly, and against arithmetic."""

import io
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from shard_builder import image as module
from shard_builder.image import MAX_BYTES, ImageError, encode, read


def file_of(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def decode(data, size):
    """The file `data` on a canvas."""
    return module.stretch(module.decode(data), size)


def ramp(size=16):
    return np.arange(size * size, dtype=np.uint32).reshape(size, size) * (256 // size) // size


def test_an_image_of_the_canvas_size_keeps_its_pixels():
    pixels = ramp().astype(np.uint8)
    assert np.array_equal(decode(file_of(Image.fromarray(pixels)), 16), pixels)


def test_other_sizes_are_stretched_with_antialiased_bilinear_resampling():
    image = Image.effect_noise((70, 45), 60)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(decode(file_of(image), 32), expected)
    # Antialiased: halving a checkerboard gives grey, and not one of its colours.
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.abs(decode(file_of(board), 8).astype(int) - 127).max() <= 2


def test_three_equal_channels_are_the_grey_image():
    pixels = ramp().astype(np.uint8)
    assert np.array_equal(decode(file_of(Image.fromarray(np.dstack([pixels] * 3))), 16), pixels)


def test_sixteen_bits_are_scaled_over_their_whole_range():
    deep = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    assert np.array_equal(decode(file_of(Image.fromarray(deep)), 16).ravel(), np.arange(256))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_of_sixteen_bits_only_those_in_use_count(bits):
    white = 2**bits - 1
    deep = np.linspace(0, white, 256).round().astype(np.uint16).reshape(16, 16)
    assert np.abs(decode(file_of(Image.fromarray(deep)), 16).ravel() - np.arange(256)).max() <= 1
    # The brightest value need not be the largest that the bits hold.
    assert np.abs(decode(file_of(Image.fromarray(deep // 2 + deep // 4)), 16).max() - 0.75 * 255) < 2


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_are_their_grey_values(mode):
    image = Image.fromarray(np.where(ramp() > 100, 255, 0).astype(np.uint8)).convert("RGB").convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    decoded = decode(file_of(image, kind), 16).astype(int)
    assert np.abs(decoded - np.where(ramp() > 100, 255, 0)).max() <= (40 if kind == "JPEG" else 0)


def test_alpha_and_the_orientation_of_a_camera_are_ignored():
    grey = ramp().astype(np.uint8)
    clear = Image.merge("LA", (Image.fromarray(grey), Image.new("L", (16, 16), 0)))
    assert np.array_equal(decode(file_of(clear), 16), grey)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert np.array_equal(decode(file_of(Image.fromarray(grey), exif=exif), 16), grey)


@pytest.mark.parametrize("codec", ["png", "raw"])
def test_lossless_codecs_give_back_the_pixels(codec):
    pixels = ramp().astype(np.uint8)
    data = encode(pixels, codec)
    back = (
        np.frombuffer(data, np.uint8).reshape(16, 16)
        if codec == "raw"
        else np.asarray(Image.open(io.BytesIO(data)))
    )
    assert np.array_equal(back, pixels)


def test_jpeg_is_pillows_at_quality_95():
    pixels = ramp().astype(np.uint8)
    assert encode(pixels, "jpeg") == file_of(Image.fromarray(pixels), "JPEG", quality=95)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_no_cut_or_flipped_file_does_anything_but_decode_or_give_a_reason(kind):
    whole = file_of(Image.effect_noise((40, 40), 60), kind)
    generator = np.random.default_rng(0)
    reasons = set()
    for _ in range(150):
        data = bytearray(whole[: generator.integers(len(whole) + 1)])
        for offset in generator.integers(0, max(len(data), 1), 3)[: len(data)]:
            data[offset] ^= int(generator.integers(256))
        try:
            assert decode(bytes(data), 8).shape == (8, 8)
        except ImageError as error:
            reasons.add(str(error).partition(":")[0])
    known = {"empty file", "not a PNG or JPEG image", "truncated", "damaged", "declares over 67,108,864 pixels"}
    assert reasons <= known
    assert "truncated" in reasons


def test_no_flipped_bit_in_the_pixels_of_a_png_file_goes_unnoticed():
    whole = file_of(Image.effect_noise((40, 40), 60))
    begin, end = whole.index(b"IDAT") + 4, whole.rindex(b"IEND") - 4
    for offset in range(begin, end, 7):
        data = bytearray(whole)
        data[offset] ^= 16
        with pytest.raises(ImageError, match=r"damaged: the checksum of its .{1,16} chunk is wrong|truncated"):
            decode(bytes(data), 8)
    # Bytes after the end do not belong to the image.
    assert np.array_equal(decode(whole + b"\0\0\0\1more", 40), decode(whole, 40))


@pytest.mark.parametrize("side", [9000, 12000, 60000])
def test_a_decompression_bomb_is_refused_by_its_header_and_without_a_warning(side):
    small = bytearray(file_of(Image.new("L", (8, 8))))
    small[16:24] = side.to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(small[12:29]).to_bytes(4, "big")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="declares over 67,108,864 pixels"):
            decode(bytes(small), 8)


def test_other_formats_are_not_decoded():
    with pytest.raises(ImageError, match="not a PNG or JPEG image"):
        decode(file_of(Image.new("L", (8, 8)), "TIFF"), 8)


def test_files_that_cannot_be_read_give_a_reason_without_a_path(tmp_path):
    for path, reason in ((tmp_path / "none.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ImageError, match=f"cannot be read: {reason}") as caught:
            read(path)
        assert str(tmp_path) not in str(caught.value)
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ImageError, match="over 256 MiB"):
        read(tmp_path / "huge.png")
