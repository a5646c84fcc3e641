import io

import numpy as np
import pytest
from PIL import Image

from fastssl.loaders import decode as images
from fastssl.loaders.decode import DecodeError, Encoded, decode, open_image, to_rgb, upright_size

# A picture in which every corner differs, and how each EXIF orientation stores it (so that it shows upright).
UPRIGHT = np.zeros((48, 32, 3), np.uint8)
UPRIGHT[:24, :16], UPRIGHT[:24, 16:], UPRIGHT[24:, :16], UPRIGHT[24:, 16:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), 250
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT.transpose(1, 0, 2)[::-1],
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
}


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def show(data: bytes) -> np.ndarray:
    """Decodes an image file as a loader does."""
    return decode(Encoded(np.frombuffer(data, np.uint8), "file", *upright_size(open_image(data))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_shows_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    pixels = show(encode(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    assert pixels.shape == UPRIGHT.shape
    assert np.abs(pixels.astype(int) - UPRIGHT).mean() < (4 if kind == "JPEG" else 1e-9)


def test_orientation_of_a_stored_jpeg_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(np.ascontiguousarray(STORED[6])), "JPEG", exif=exif)
    assert decode(Encoded(np.frombuffer(data, np.uint8), "jpg", 32, 48)).shape == (32, 48, 3)


def test_sixteen_bits_keep_their_high_byte():
    values = np.arange(0, 1 << 16, 64, dtype=np.uint16).reshape(32, 32)
    assert np.array_equal(show(encode(Image.fromarray(values), "PNG")), np.repeat((values >> 8)[..., None], 3, 2))


def test_palette_alpha_and_gray():
    red = Image.new("RGB", (4, 4), (200, 10, 10))
    clear = red.copy()
    clear.putalpha(Image.new("L", (4, 4), 7))
    palette = encode(red.quantize(4), "PNG", transparency=0)
    for data in (encode(clear, "PNG"), palette, encode(red.quantize(4), "GIF"), encode(red, "BMP"), encode(red, "PPM")):
        assert (show(data) == (200, 10, 10)).all()
    assert (show(encode(Image.new("LA", (4, 4), (90, 0)), "PNG")) == 90).all()
    assert (show(encode(Image.new("1", (4, 4), 1), "PNG")) == 255).all()


def test_cmyk_jpeg_is_shown_in_rgb():
    pixels = show(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 6


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **{"lossless": True} if kind == "WEBP" else {})  # fmt: skip  # noqa: E501
        assert (show(data) == (255, 0, 0)).all()


def test_raw_pixels_are_copied_and_checked():
    data = np.arange(24, dtype=np.uint8)
    data.setflags(write=False)
    pixels = decode(Encoded(data, "raw", 2, 4))
    assert pixels.flags.writeable
    assert np.array_equal(pixels.reshape(-1), data)
    with pytest.raises(DecodeError, match="has 24 bytes, but 3 x 4 RGB pixels were promised"):
        decode(Encoded(data, "raw", 3, 4))


JPEG = encode(Image.fromarray(UPRIGHT), "JPEG")
PNG = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "PNG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has zero bytes"),
        (b"<html>not found</html>", "is not an image"),
        (JPEG[:-2], r"is truncated \(no end-of-image marker\)"),
        (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "is truncated"),
        (JPEG[:30], "is truncated|has a truncated or damaged header"),
        (PNG[: len(PNG) // 2], "is truncated"),
        (PNG[:20], "has a damaged header"),
        (PNG[:2000] + bytes(500) + PNG[2500:], "is damaged|is truncated"),
        (encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "has floating-point pixels"),
        (encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "has 32-bit pixels"),
    ],
)
def test_unusable_data_says_why(data, message):
    with pytest.raises(DecodeError, match=f"^({message})"):
        decode(Encoded(np.frombuffer(data, np.uint8), "file", 48, 32))


def test_absurd_dimensions(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(DecodeError, match=r"has absurd dimensions \(48 x 32; at most 1000 pixels"):
        open_image(JPEG)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DecodeError, match="has absurd dimensions"):
        open_image(JPEG)


def test_size_that_differs_from_the_promise():
    with pytest.raises(DecodeError, match="is 48 x 32 pixels, but 50 x 32 were promised"):
        decode(Encoded(np.frombuffer(JPEG, np.uint8), "jpg", 50, 32))


def test_to_rgb_leaves_rgb_alone():
    image = open_image(JPEG)
    assert to_rgb(image) is image
