"""Images as they come, with the right pixel values: one reader for files and PIL images."""

import os
import random
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, features

from vggtorch.models import images, preprocess, read_image, to_rgb

# Four colours in the corners of an image that is wider than it is high.
RED, GREEN, BLUE, YELLOW = (250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10)


def corners(width=32, height=16):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = YELLOW
    return pixels


# What a camera stores of `corners` by each orientation (EXIF 2.3, table of tag 274).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),  # shown turned by 90 degrees clockwise, so stored the other way
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp", "avif"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_as_its_exif_orientation_says(orientation, suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](corners())))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif, quality=95)
    for found in (read_image(path), to_rgb(Image.open(path))):
        assert found.size == (32, 16)
        np.testing.assert_allclose(np.array(found)[4::8, 4::8], corners()[4::8, 4::8], atol=12)


def test_prediction_turns_files_and_pil_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "a.png"
    Image.fromarray(corners(64, 64)).save(path, exif=exif)
    expected = preprocess(Image.fromarray(corners(64, 64)[::-1, ::-1]), "oxford", size=32)
    np.testing.assert_array_equal(preprocess(path, "oxford", size=32), expected)
    np.testing.assert_array_equal(preprocess(Image.open(path), "oxford", size=32), expected)
    converted = Image.open(path).convert("RGB")  # PIL keeps the EXIF data and turns nothing
    np.testing.assert_array_equal(preprocess(converted, "oxford", size=32), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_exif_block_leaves_the_image_as_it_is_stored(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(corners()).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=95)
    np.testing.assert_allclose(np.array(read_image(path))[4, 4], RED, atol=12)


def pixel(path, at=(0, 0)):
    return read_image(path).getpixel(at)


GREY16 = np.array([[0, 128 * 257, 65535, 1000]], np.uint16)
GREY8 = [0, 128, 255, 4]  # round(1000 / 257)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "jp2"])
def test_16_bit_grey_is_scaled(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 1 65535\n" + GREY16.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY16).save(path)
    assert [pixel(path, (x, 0)) for x in range(4)] == [(v, v, v) for v in GREY8]


def png(path, depth, colour, rows, *chunks):
    """A PNG file of kinds that PIL doesn't write."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    width = len(rows[0]) * 8 // depth // {0: 1, 2: 3, 4: 2}[colour]
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )
    return path


def test_16_bit_rgb_and_transparent_values(tmp_path):
    row = struct.pack(">6H", 65535, 128 * 257, 0, 500, 600, 700)
    assert pixel(png(tmp_path / "rgb.png", 16, 2, [row])) == (255, 128, 0)
    key = (b"tRNS", struct.pack(">3H", 500, 600, 700))
    path = png(tmp_path / "key.png", 16, 2, [row], key)
    assert (pixel(path), pixel(path, (1, 0))) == ((255, 128, 0), (255, 255, 255))
    grey = png(
        tmp_path / "grey.png", 16, 0, [struct.pack(">2H", 300, 2570)], (b"tRNS", b"\x01\x2c")
    )
    assert (pixel(grey), pixel(grey, (1, 0))) == ((255, 255, 255), (10, 10, 10))
    alpha = png(tmp_path / "la.png", 16, 4, [struct.pack(">4H", 0, 65535, 0, 0)])
    assert (pixel(alpha), pixel(alpha, (1, 0))) == ((0, 0, 0), (255, 255, 255))


def tiff(path, bits, photometric, strip):
    """A TIFF file of one row of four grey values, of kinds that PIL doesn't write."""
    tags = [(256, 4), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 134), (277, 1)]
    tags += [(278, 1), (279, len(strip)), (339, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    path.write_bytes(head + strip)
    assert len(head) == 134
    return path


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_a_cameras_12_bits_in_16_are_warned_of(shape, tmp_path):
    for value, count in ((4095, 1), (65535, 0)):
        for compression in (None, "zlib"):
            values = np.full(shape, value, np.uint16)
            tifffile.imwrite(tmp_path / "a.tif", values, compression=compression)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert preprocess(tmp_path / "a.tif", "oxford", size=4).shape == (1, 4, 4, 3)
                with Image.open(tmp_path / "a.tif") as opened:
                    preprocess(opened, "oxford", size=4)
                    assert "brightest" not in opened.info
            assert sum("4095 * 255) and save" in str(w.message) for w in caught) == 2 * count


def test_so_is_an_image_of_pils_own():
    with pytest.warns(UserWarning, match="doesn't use what 16 bits hold"):
        preprocess(Image.fromarray(np.full((4, 4), 4095, np.uint16)), "oxford", size=4)


def test_tiff_of_12_bits_and_with_white_as_zero(tmp_path):
    # Two values of 12 bits in three bytes: 0 and 4095, 2048 and 16.
    twelve = tiff(tmp_path / "12.tif", 12, 1, bytes.fromhex("000fff800010"))
    assert [pixel(twelve, (x, 0))[0] for x in range(4)] == [0, 255, 128, 1]
    values = np.array([0, 65535, 32768, 257], "<u2")
    for photometric, expected in ((1, [0, 255, 128, 1]), (0, [255, 0, 127, 254])):
        path = tiff(tmp_path / "16.tif", 16, photometric, values.tobytes())
        assert [pixel(path, (x, 0))[0] for x in range(4)] == expected
        path = tiff(tmp_path / "8.tif", 8, photometric, bytes([0, 255, 128, 1]))
        assert [pixel(path, (x, 0))[0] for x in range(4)] == expected


@pytest.mark.parametrize(
    ("depth", "row", "expected"),
    [(2, 0b00011011, [0, 255, 170, 255]), (4, 0x01, [0, 255]), (1, 0b01010101, [0, 255] * 4)],
)
def test_a_transparent_value_of_few_bits(depth, row, expected, tmp_path):
    one_is_transparent = (b"tRNS", b"\0\1")
    path = png(tmp_path / "a.png", depth, 0, [bytes([row])], one_is_transparent)
    assert [pixel(path, (x, 0))[0] for x in range(8 // depth)] == expected


def test_tiff_files_that_pillow_reads_wrongly_or_not_at_all_are_refused(tmp_path):
    colours = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    planes = np.ascontiguousarray(colours.transpose(2, 0, 1))

    def written(values, **options):
        tifffile.imwrite(tmp_path / "a.tif", values, **options)
        return tmp_path / "a.tif"

    separate = {"photometric": "rgb", "planarconfig": "separate"}
    for compression in ("deflate", None):
        path = written(planes, **separate, compression=compression)
        np.testing.assert_array_equal(read_image(path), colours)
    path = written(planes.astype(np.uint16) * 257, **separate, compression="deflate")
    np.testing.assert_array_equal(read_image(path), colours)
    path = written(planes.astype(np.uint16) * 257, **separate)
    with pytest.raises(ValueError, match="a plane for each colour and more than 8 bits in"):
        read_image(path)
    two = {"photometric": "minisblack", "planarconfig": "separate", "extrasamples": [0]}
    path = written(planes[:2].astype(np.uint16) * 257, **two)
    with pytest.raises(ValueError, match="a plane for each colour and more than 8 bits in"):
        read_image(path)
    for compression in ("deflate", None):
        path = written(np.array([[-3, 3]], np.int8), compression=compression)
        with pytest.raises(ValueError, match="signed values, and nothing says which of them are"):
            read_image(path)
    with pytest.raises(ValueError, match="its first page is a smaller copy of another one"):
        read_image(written(colours, photometric="rgb", subfiletype=1))
    with pytest.raises(ValueError, match="a TIFF file of a kind that Pillow .* floating-point col"):
        read_image(written(colours.astype(np.float32), photometric="rgb"))


@pytest.mark.parametrize(
    "values", [np.array([[0, 0.5, 1]], "f4"), np.array([[0, 1000, 2000]], "i4")]
)
def test_values_of_unknown_range_are_refused_and_of_a_stated_range_scaled(values, tmp_path):
    path = tmp_path / "a.tiff"
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=r"a.tiff: .*nothing says which of them are black and"):
        read_image(path)
    with pytest.raises(ValueError, match=r"nothing says .* save them with 8 bits"):
        preprocess(Image.fromarray(values), "oxford")
    stated = {340: values.dtype.type(0).item(), 341: values.max().item()}
    Image.fromarray(values).save(path, tiffinfo=stated)
    assert [pixel(path, (x, 0))[0] for x in range(3)] == [0, 128, 255]
    beyond = values.copy()
    beyond[0, 2] *= 2
    Image.fromarray(beyond).save(path, tiffinfo=stated)
    with pytest.raises(ValueError, match="has values from 0 to .* says that they lie between 0"):
        read_image(path)
    if values.dtype == np.float32:
        beyond[0, 0] = np.nan
        Image.fromarray(beyond).save(path, tiffinfo=stated)
        with pytest.raises(ValueError, match="has values from nan"):
            read_image(path)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 51), (244, 224, 204)),  # a fifth of it, four fifths white
        ("LA", (100, 51), (224, 224, 224)),
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
    ],
)
def test_alpha_lies_over_white_and_grey_is_rgb(mode, colour, expected, tmp_path):
    image = Image.new(mode, (3, 2), colour)
    image.save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == expected
    assert to_rgb(image).getpixel((0, 0)) == expected
    if mode == "RGBA":
        image.save(tmp_path / "a.webp", lossless=True)
        assert pixel(tmp_path / "a.webp") == expected


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_palette_with_a_transparent_colour(suffix, tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / f"plain.{suffix}")
    image.save(tmp_path / f"clear.{suffix}", transparency=1)
    assert pixel(tmp_path / f"plain.{suffix}", (1, 0)) == (40, 50, 60)
    assert pixel(tmp_path / f"clear.{suffix}") == (10, 20, 30)
    assert pixel(tmp_path / f"clear.{suffix}", (1, 0)) == (255, 255, 255)


def test_a_palette_with_half_transparent_colours(tmp_path):
    image = Image.new("P", (1, 1))
    image.putpalette([0, 100, 200])
    image.save(tmp_path / "a.png", transparency=b"\x33")
    assert pixel(tmp_path / "a.png") == (204, 224, 244)


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk(suffix, tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / f"a.{suffix}", quality=100)
    np.testing.assert_allclose(pixel(tmp_path / f"a.{suffix}"), (255, 0, 0), atol=3)


@pytest.mark.parametrize("suffix", ["gif", "tiff", "png", "webp", "mpo"])
def test_the_first_of_several_frames_is_read(suffix, tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=[second], quality=95)
    with Image.open(path) as opened:
        assert getattr(opened, "n_frames", 1) == 2
    np.testing.assert_allclose(pixel(path), RED, atol=12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        preprocess(path, "oxford", size=8)
    said = ["An image file has several frames or pages, of which the first is read."]
    assert [str(w.message) for w in caught] == (said if suffix != "mpo" else [])


def test_heic_is_read_or_says_what_it_takes(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"  # phones export them under this name
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "pillow_heif", None)
        context.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
        with pytest.raises(ValueError, match="a.jpg: .*pip install pillow-heif"):
            read_image(path)
    pytest.importorskip("pillow_heif").register_heif_opener()
    with pytest.raises(ValueError, match="Can't read .*a.jpg"):
        read_image(path)
    # A HEIC file turns its image by a property of its own, which libheif follows; by its standard
    # the EXIF orientation beside it is only for information, and turning again would be wrong.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(corners(64, 32)).save(tmp_path / "b.heic", quality=95, exif=exif)
    found = np.array(read_image(tmp_path / "b.heic"))
    np.testing.assert_allclose(found[8::16, 8::32], corners(64, 32)[8::16, 8::32], atol=12)


SAVED = ["bmp", "gif", "jpg", "jp2", "png", "ppm", "tiff", "webp"] + (
    ["avif"] if features.check("avif") else []
)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", SAVED)
def test_damaged_files_raise_nothing_but_a_value_error_that_names_them(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    draw = random.Random(suffix)
    damaged = [b"", whole[:20], whole[: len(whole) // 3]]
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(draw.choice([1, 4, 30])):
            changed[draw.randrange(min(len(whole), draw.choice([64, 4000])))] = draw.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert read_image(path).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith(f"Can't read {path}: ")
            refused += 1
    assert refused >= 3


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, IndexError, MemoryError])
def test_whatever_pil_raises_names_the_file(error, tmp_path, monkeypatch):
    def fail(image):
        raise error("broken inside")

    path = tmp_path / "a.png"
    Image.fromarray(corners()).save(path)
    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(ValueError, match=r"Can't read .*a.png: broken inside"):
        read_image(path)


def test_what_is_no_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_image(tmp_path)
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="damaged, or of no kind that Pillow .* reads here: AVIF"):
        read_image(tmp_path / "a.jpg")  # PIL would start Ghostscript


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="not a regular file"):
        preprocess(tmp_path / "a.jpg", "oxford")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(13376, 13376), (20000, 20000)])
def test_too_many_pixels_are_refused_by_the_header(size, tmp_path):
    path = tmp_path / "a.png"
    header = struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)
    png(path, 8, 0, [b"\0"])
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    path.write_bytes(start + struct.pack(">I", zlib.crc32(start[12:])) + path.read_bytes()[33:])
    with pytest.raises(ValueError, match=r"a.png: it has .* pixels; expected at most 134,217,728"):
        preprocess(path, "oxford")


@pytest.mark.parametrize("size", [(2001, 2), (1, 1001)])
def test_strips_are_refused_and_narrow_images_are_not(size, tmp_path):
    message = f"it has {size[0]}x{size[1]} pixels; expected one side at most 1,000 times as long"
    Image.new("RGB", size).save(tmp_path / "strip.png")
    for given in (tmp_path / "strip.png", Image.new("RGB", size)):
        with pytest.raises(ValueError, match=message):
            preprocess(given, "oxford")
    for narrow in ((1000, 1), (1, 1)):
        found = preprocess(Image.new("RGB", narrow, (0, 0, 255)), "oxford", size=16)
        assert found.shape == (1, 16, 16, 3)
        np.testing.assert_allclose(found[0, 8, 8], (255 - 103.939, -116.779, -123.68), atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("La", (40, 51), (244, 244, 244)),  # grey of 200 at a fifth: 40, and four fifths of white
        ("HSV", (0, 255, 200), (200, 0, 0)),
        ("YCbCr", (200, 128, 128), (200, 200, 200)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
    ],
)
def test_other_colour_spaces(mode, colour, expected):
    found = np.asarray(to_rgb(Image.new(mode, (4, 4), colour)))[1, 1]
    np.testing.assert_allclose(found, expected, atol=2)


def test_the_gate_bounds_the_pixels_and_lets_a_larger_image_through_alone():
    import threading
    import time

    gate, lock = images.PixelGate(100), threading.Lock()
    held: list[int] = []
    most: list[list[int]] = []

    def work(pixels):
        with gate.hold(pixels):
            with lock:
                held.append(pixels)
                most.append(list(held))
            time.sleep(0.002)
            with lock:
                held.remove(pixels)

    threads = [threading.Thread(target=work, args=(p,)) for p in [40, 60, 30, 500, 90, 10] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == 30
    assert all(sum(together) <= 100 or together == [500] for together in most)
