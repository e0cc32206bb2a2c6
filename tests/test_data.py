"""What counts as a picture, what becomes of its pixels, and how a folder of them becomes batches."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import unicodedata
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploykit.artifact import Preprocess
from deploykit.data import Images, calibration_subset, digits, folder, open_image, preprocess, to_train_and_to_hold_out
from deploykit.data.pictures import EXTENSIONS, PIXEL_LIMIT
from deploykit.errors import CapabilityError, DataError

IMAGENET = Preprocess(resize=40, crop=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PLAIN = Preprocess(resize=None, crop=(4, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
GREY = Preprocess(resize=None, crop=(8, 8), mean=(0.0,), std=(1.0,), channels="L")


def picture(width: int = 48, height: int = 36, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth colour ramp with noise on it, so that resampling and channel order show."""
    y, x = np.mgrid[0:height, 0:width]
    ramps = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], axis=-1)
    noise = np.random.default_rng(seed).integers(-40, 40, ramps.shape)
    return Image.fromarray(np.clip(ramps + noise, 0, 255).astype(np.uint8)).convert(mode)


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def truncate(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_16_bit(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint16 as a PNG, which Pillow cannot write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_16_bit(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint16 as an uncompressed TIFF of one strip, which Pillow cannot write."""
    height, width, _ = pixels.shape
    body = pixels.astype("<u2").tobytes()
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 0), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 0), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(body))]
    after = 8 + 2 + 12 * len(entries) + 4
    places = {258: after, 273: after + 6}
    table = b"".join(struct.pack("<HHII", tag, kind, count, places.get(tag, value)) for tag, kind, count, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4) + struct.pack("<HHH", 16, 16, 16) + body


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG with the header of a large black picture and next to no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))
    return path


class TestPreprocessing:
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    @pytest.mark.parametrize(
        "size",
        [(48, 36), (36, 48), (40, 40), (333, 500), (500, 333), (41, 61), (17, 23), (23, 17), (40, 31), (9, 200), (32, 57)],
        ids=lambda size: f"{size[0]}x{size[1]}",
    )
    @pytest.mark.parametrize(("resize", "crop"), [(40, 32), (33, 32), (32, 32), (20, 32), (40, 33), (41, 28)])
    def test_it_equals_torchvisions_classification_preset(self, interpolation, size, resize, crop):
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms._presets import ImageClassification

        mode = InterpolationMode(interpolation)
        preset = ImageClassification(crop_size=crop, resize_size=resize, interpolation=mode)
        how = Preprocess(resize, (crop, crop), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation=interpolation)

        ours = preprocess(picture(*size), how)

        np.testing.assert_allclose(ours, preset(picture(*size)).numpy(), rtol=0, atol=1e-6)

    def test_a_greyscale_input_equals_torchvisions_too(self):
        from torchvision.transforms import functional

        image = picture(50, 30).convert("L")
        theirs = functional.to_tensor(functional.center_crop(functional.resize(image, [40]), [32, 32])).numpy()

        ours = preprocess(image, Preprocess(40, (32, 32), (0.1,), (0.3,), channels="L"))

        np.testing.assert_allclose(ours, (theirs - 0.1) / 0.3, rtol=0, atol=1e-6)

    def test_the_result_is_contiguous_float32_in_channels_height_width_order(self):
        how = Preprocess(resize=40, crop=(24, 32), mean=(0.5,) * 3, std=(0.5,) * 3)

        array = preprocess(picture(), how)

        assert (array.shape, array.dtype, array.flags.c_contiguous) == ((3, 24, 32), np.float32, True)
        assert array.shape == how.shape

    def test_stretch_resizes_the_whole_picture_to_the_input_and_ignores_resize(self):
        from torchvision.transforms import functional

        image = picture(70, 30)
        how = Preprocess(resize=40, crop=(20, 28), mean=(0.0,) * 3, std=(1.0,) * 3, fit="stretch")

        expected = functional.to_tensor(functional.resize(image, [20, 28])).numpy()

        np.testing.assert_allclose(preprocess(image, how), expected, rtol=0, atol=1e-6)

    def test_without_resize_the_pixels_are_only_cropped(self):
        image = picture(10, 8)

        array = preprocess(image, PLAIN)

        np.testing.assert_array_equal(array, np.asarray(image, np.float32)[2:6, 3:7].transpose(2, 0, 1) / np.float32(255))

    def test_nearest_makes_no_new_values(self):
        image = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8))
        how = Preprocess(resize=8, crop=(8, 8), mean=(0.0,), std=(1.0,), channels="L", interpolation="nearest")

        assert set(np.unique(preprocess(image, how))) == {0.0, 1.0}

    def test_a_picture_smaller_than_the_crop_is_surrounded_by_zeros_before_normalisation(self):
        how = Preprocess(resize=None, crop=(5, 5), mean=(0.5,), std=(0.5,), channels="L")

        array = preprocess(Image.new("L", (2, 2), 255), how)

        expected = np.full((5, 5), -1.0, np.float32)
        expected[1:3, 1:3] = 1.0
        np.testing.assert_array_equal(array[0], expected)

    def test_greyscale_is_replicated_into_rgb(self):
        array = preprocess(picture(mode="L"), PLAIN)

        np.testing.assert_array_equal(array[0], array[1])
        np.testing.assert_array_equal(array[0], array[2])

    def test_rgb_becomes_greyscale_by_luma(self):
        array = preprocess(Image.new("RGB", (8, 8), (255, 0, 0)), GREY)

        assert np.unique(array) == np.float32(76) / np.float32(255)  # 0.299 of 255 (ITU-R 601-2)

    def test_a_picture_too_narrow_to_resize_is_refused_before_memory_is_taken(self, tmp_path):
        save(tmp_path / "line.png", Image.new("L", (40_000, 1)))

        with pytest.raises(DataError, match=r"line\.png") as caught:
            folder(tmp_path, labelled=False).array(0, IMAGENET)

        assert "more than 50,000,000" in caught.value.why


class TestPixels:
    """Each kind of file as `open_image` gives it."""

    def values(self, path: Path) -> np.ndarray:
        return np.asarray(open_image(path))

    @pytest.mark.parametrize("extension", sorted(set(EXTENSIONS)))
    def test_every_extension_that_is_looked_for_can_be_read(self, tmp_path, extension):
        mode = "L" if extension == ".pgm" else "RGB"

        image = open_image(save(tmp_path / f"a{extension}", picture(mode=mode)))

        assert image.size == (48, 36)
        assert image.mode in ("RGB", "L")

    def test_lossless_rgb_comes_back_as_it_was(self, tmp_path):
        np.testing.assert_array_equal(self.values(save(tmp_path / "a.png")), np.asarray(picture()))

    def test_greyscale_stays_greyscale(self, tmp_path):
        assert open_image(save(tmp_path / "a.jpg", picture(mode="L"))).mode == "L"

    def test_one_bit_becomes_black_and_white(self, tmp_path):
        assert set(np.unique(self.values(save(tmp_path / "a.png", picture(mode="1"))))) == {0, 255}

    def test_a_palette_becomes_its_colours(self, tmp_path):
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 10, 200, 30])

        np.testing.assert_array_equal(self.values(save(tmp_path / "a.png", image))[0, 0], [10, 200, 30])

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
    def test_transparent_pixels_are_white_whatever_colour_hides_under_them(self, tmp_path, mode):
        if mode == "PA":
            path = save(tmp_path / "a.gif", Image.new("P", (4, 4), 0), transparency=0)
        else:
            path = save(tmp_path / "a.png", Image.new(mode, (4, 4), (120, 0) if mode == "LA" else (200, 10, 10, 0)))

        np.testing.assert_array_equal(self.values(path), np.full((4, 4, 3), 255))

    def test_half_transparent_black_on_white_is_grey(self, tmp_path):
        path = save(tmp_path / "a.png", Image.new("RGBA", (4, 4), (0, 0, 0, 128)))

        np.testing.assert_array_equal(self.values(path), np.full((4, 4, 3), 127))

    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_a_colour_that_stands_for_transparent_is_white(self, tmp_path, mode):
        black = 0 if mode == "L" else (0, 0, 0)

        path = save(tmp_path / "a.png", Image.new(mode, (4, 4), black), transparency=black)

        assert np.unique(self.values(path)) == 255

    def test_a_sixteen_bit_value_that_stands_for_transparent_is_white(self, tmp_path):
        path = save(tmp_path / "a.png", Image.fromarray(np.array([[0, 257]], np.uint16)), transparency=0)

        np.testing.assert_array_equal(self.values(path), [[255, 1]])

    def test_opaque_alpha_changes_nothing(self, tmp_path):
        np.testing.assert_array_equal(self.values(save(tmp_path / "a.png", picture(mode="RGBA"))), np.asarray(picture()))

    def test_cmyk_is_converted_and_adobes_inverted_jpeg_is_not_a_negative(self, tmp_path):
        image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # pure cyan
        inverted = save(tmp_path / "a.jpg", image, quality=95)
        straight = save(tmp_path / "a.tif", image)
        assert b"Adobe" in inverted.read_bytes()

        for path in (inverted, straight):
            np.testing.assert_allclose(self.values(path)[8, 8], [0, 255, 255], atol=3)

    @pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif", "a.pgm"])
    def test_sixteen_bits_are_scaled_and_never_clipped(self, tmp_path, name):
        ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
        path = tmp_path / name
        if name == "big_endian.tif":
            Image.frombytes("I;16B", (256, 4), ramp.astype(">u2").tobytes()).save(path)
        elif name == "a.pgm":
            path.write_bytes(b"P5 256 4 65535\n" + ramp.astype(">u2").tobytes())
        else:
            Image.fromarray(ramp).save(path)

        np.testing.assert_allclose(self.values(path) / 255, ramp / 65535, rtol=0, atol=0.5 / 255 + 1e-9)

    def test_sixteen_bit_white_and_black_are_exact(self, tmp_path):
        path = save(tmp_path / "a.png", Image.fromarray(np.array([[0, 65535]], np.uint16)))

        np.testing.assert_array_equal(self.values(path), [[0, 255]])

    @pytest.mark.parametrize("extension", [".png", ".tif"])
    def test_sixteen_bit_colour_keeps_the_high_byte_and_is_never_clipped(self, tmp_path, extension):
        ramp = np.linspace(0, 65535, 4 * 64 * 3).astype(np.uint16).reshape(4, 64, 3)
        path = tmp_path / f"a{extension}"
        path.write_bytes(png_16_bit(ramp) if extension == ".png" else tiff_16_bit(ramp))

        np.testing.assert_array_equal(self.values(path), ramp >> 8)
        assert np.abs(self.values(path) - ramp / 257).max() < 1

    def test_a_phones_picture_of_several_parts_is_read_as_its_first(self, tmp_path):
        save(tmp_path / "a.mpo", Image.new("RGB", (16, 16), (200, 0, 0)), save_all=True, append_images=[picture(16, 16)])
        path = (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")

        np.testing.assert_allclose(self.values(path)[8, 8], [200, 0, 0], atol=3)

    def test_a_palette_with_transparency_in_the_middle_is_white_there_alone(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)

        path = save(tmp_path / "a.png", image, transparency=0)

        np.testing.assert_array_equal(self.values(path), [[[255, 255, 255], [200, 100, 50]]])

    @pytest.mark.parametrize(("mode", "word"), [("F", "float"), ("I", "mode I"), ("LAB", "mode LAB")])
    def test_pixels_without_a_known_range_are_refused_by_name(self, tmp_path, mode, word):
        path = save(tmp_path / "a.tif", Image.new(mode, (4, 4)))

        with pytest.raises(DataError, match=r"a\.tif") as caught:
            open_image(path)

        assert word in caught.value.why

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_exif_orientation_gives_the_same_upright_picture(self, tmp_path, orientation):
        upright = picture(24, 16)
        # The inverse of what a viewer does for each orientation (Exif 2.3, tag 0x0112).
        stored = {
            1: upright,
            2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            3: upright.transpose(Image.Transpose.ROTATE_180),
            4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
            5: upright.transpose(Image.Transpose.TRANSPOSE),
            6: upright.transpose(Image.Transpose.ROTATE_90),
            7: upright.transpose(Image.Transpose.TRANSVERSE),
            8: upright.transpose(Image.Transpose.ROTATE_270),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation

        for name in ("a.png", "a.tif"):
            path = save(tmp_path / name, stored, exif=exif)
            np.testing.assert_array_equal(self.values(path), np.asarray(upright))

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_an_exif_orientation_that_means_nothing_is_harmless(self, tmp_path, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation

        path = save(tmp_path / "a.png", exif=exif)

        np.testing.assert_array_equal(self.values(path), np.asarray(picture()))

    def test_sixteen_bit_pictures_are_turned_upright_too(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        path = save(tmp_path / "a.png", Image.fromarray(np.array([[0, 257, 514]], np.uint16)), exif=exif)

        np.testing.assert_array_equal(self.values(path), [[0], [1], [2]])

    @pytest.mark.parametrize("extension", [".gif", ".webp", ".png", ".tif"])
    def test_the_first_frame_of_an_animation_is_taken(self, tmp_path, extension):
        red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
        options = {"lossless": True} if extension == ".webp" else {}

        path = save(tmp_path / f"a{extension}", red, save_all=True, append_images=[blue], **options)

        np.testing.assert_array_equal(self.values(path)[4, 4], [255, 0, 0])

    def test_a_picture_that_was_opened_does_not_keep_its_file(self, tmp_path):
        path = save(tmp_path / "a.tif", picture(), save_all=True, append_images=[picture(seed=1)])

        image = open_image(path)

        assert type(image) is Image.Image
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))


class TestBadFiles:
    def reason(self, path: Path) -> str:
        with pytest.raises(DataError) as caught:
            open_image(path)
        assert path.name in caught.value.what
        return caught.value.why

    @pytest.mark.parametrize("extension", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".ppm"])
    def test_a_truncated_file_is_named(self, tmp_path, extension):
        assert self.reason(truncate(save(tmp_path / f"cut{extension}", picture(200, 150))))

    def test_a_web_page_named_jpg_is_quoted(self, tmp_path):
        path = tmp_path / "page.jpg"
        path.write_text("<!DOCTYPE html><title>404</title>")

        assert "<!DOCTYPE html>" in self.reason(path)

    def test_an_empty_file_is_called_empty(self, tmp_path):
        path = tmp_path / "empty.png"
        path.touch()

        assert self.reason(path) == "the file is empty"

    def test_a_missing_file_is_named(self, tmp_path):
        assert "no such file" in self.reason(tmp_path / "gone.png")

    @pytest.mark.parametrize(
        ("width", "height"),
        [(10_000, 5_001), (10_000, 10_000), (20_000, 20_000)],
        ids=["just over our limit", "where Pillow only warns", "where Pillow raises"],
    )
    def test_a_decompression_bomb_is_refused_from_its_header(self, tmp_path, width, height):
        path = bomb(tmp_path / "bomb.png", width, height)
        tracemalloc.start()

        reason = self.reason(path)

        assert "50,000,000" in reason
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()

    @pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
    def test_a_bomb_in_the_metadata_takes_no_memory(self, tmp_path, kind):
        path = save(tmp_path / "a.png")
        packed = zlib.compress(bytes(200 << 20), 9)
        body = {b"zTXt": b"k\0\0", b"iCCP": b"k\0\0", b"iTXt": b"k\0\1\0\0\0"}[kind] + packed
        content = path.read_bytes()
        path.write_bytes(content[:33] + chunk(kind, body) + content[33:])
        tracemalloc.start()

        try:
            with contextlib.suppress(DataError):
                open_image(path)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()

        assert peak < 32 << 20

    def test_a_gif_whose_frame_is_larger_than_its_screen_is_a_bomb_or_its_screen(self, tmp_path):
        path = save(tmp_path / "a.gif", Image.new("L", (8, 8)))
        content = bytearray(path.read_bytes())
        at = content.index(b"\x2c")  # the image descriptor: left, top, width, height
        content[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
        path.write_bytes(content)

        assert self.reason(path)

    @pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
    def test_no_flipped_bit_is_more_than_a_bad_file(self, tmp_path, extension):
        content = save(tmp_path / f"whole{extension}", picture(40, 30)).read_bytes()
        random = np.random.default_rng(0)
        for _ in range(60):
            flipped = bytearray(content)
            flipped[random.integers(len(content))] ^= 1 << random.integers(8)
            path = tmp_path / f"flipped{extension}"
            path.write_bytes(flipped)
            with contextlib.suppress(DataError):
                assert open_image(path).mode in ("RGB", "L")

    def test_a_picture_of_exactly_the_limit_is_not_a_bomb(self, tmp_path):
        bomb(tmp_path / "large.png", 10_000, PIXEL_LIMIT // 10_000)

        assert len(folder(tmp_path, labelled=False)) == 1

    def test_pillows_own_limit_is_left_alone(self, tmp_path):
        before = Image.MAX_IMAGE_PIXELS

        open_image(save(tmp_path / "a.png"))

        assert before == Image.MAX_IMAGE_PIXELS

    def test_formats_that_start_other_programs_are_not_tried(self, tmp_path):
        path = tmp_path / "postscript.jpg"
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")

        assert "not a picture" in self.reason(path)

    def test_damaged_metadata_is_no_warning_of_ours(self, tmp_path):
        path = save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0" * 4)

        open_image(path)  # the test run turns every warning into an error


class TestFolder:
    def test_pictures_are_found_recursively_and_sorted_by_the_bytes_of_their_names(self, tmp_path):
        for name in ("b.png", "a/z.PNG", "B.JPEG", "ä.png", "a/b/c.bmp", "a-b.png"):
            save(tmp_path / name)

        names = folder(tmp_path, labelled=False).names

        assert names == ("B.JPEG", "a-b.png", "a/b/c.bmp", "a/z.PNG", "b.png", "ä.png")

    def test_an_unlabelled_folder_has_neither_labels_nor_classes(self, tmp_path):
        save(tmp_path / "cat/a.png")

        images = folder(tmp_path, classes=["cat"], labelled=False)

        assert (images.labels, images.classes, len(images), images.origin) == (None, (), 1, str(tmp_path))

    def test_files_that_are_no_pictures_and_hidden_ones_are_ignored(self, tmp_path):
        save(tmp_path / "a.png")
        save(tmp_path / ".thumbnails/a.png")
        save(tmp_path / ".hidden.png")
        (tmp_path / "labels.json").write_text("{}")
        (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")

        assert folder(tmp_path, labelled=False).names == ("a.png",)

    @pytest.mark.parametrize("name", ["photo", "photo.jpg.download"])
    def test_a_photograph_is_not_ignored_for_its_name(self, tmp_path, name):
        save(tmp_path / "a.png")
        save(tmp_path / "photo.jpg").rename(tmp_path / name)

        with pytest.raises(DataError, match=f"{name}: it looks like a picture"):
            folder(tmp_path, labelled=False)

    def test_a_phones_heic_photograph_is_not_ignored(self, tmp_path):
        save(tmp_path / "a.png")
        (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0")

        with pytest.raises(DataError, match=r"IMG_1\.HEIC"):
            folder(tmp_path, labelled=False)

    def test_a_missing_folder_a_file_and_a_folder_without_pictures_are_told_apart(self, tmp_path):
        (tmp_path / "notes.txt").touch()

        with pytest.raises(DataError, match="nowhere") as missing:
            folder(tmp_path / "nowhere", labelled=False)
        with pytest.raises(DataError, match=r"notes\.txt") as file:
            folder(tmp_path / "notes.txt", labelled=False)
        with pytest.raises(DataError, match="no images") as empty:
            folder(tmp_path, labelled=False)

        assert missing.value.why == "no such file or directory"
        assert file.value.why == "not a directory"
        assert all(extension in empty.value.why for extension in EXTENSIONS)
        assert str(tmp_path) in empty.value.what

    def test_a_sub_folder_that_cannot_be_listed_is_not_passed_over(self, tmp_path, monkeypatch):
        save(tmp_path / "a.png")
        save(tmp_path / "locked/b.png")
        scandir = os.scandir

        def refusing(path):
            if Path(path).name == "locked":
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)

        with pytest.raises(DataError, match="locked") as caught:
            folder(tmp_path, labelled=False)

        assert caught.value.why == "permission denied"

    def test_all_bad_files_are_reported_at_once_and_the_first_ten_are_named(self, tmp_path):
        save(tmp_path / "good.png")
        for index in range(13):
            (tmp_path / f"bad{index:02d}.jpg").write_text("<html>")

        with pytest.raises(DataError, match="13 of 14 images") as caught:
            folder(tmp_path, labelled=False)

        assert len(caught.value.problems) == 11
        assert caught.value.problems[0].startswith("bad00.jpg: it is not a picture")
        assert caught.value.problems[-1] == "and 3 more"
        assert "--skip-bad-images" in caught.value.fix

    def test_bad_files_are_left_out_and_listed_when_that_was_asked_for(self, tmp_path):
        save(tmp_path / "good.png")
        (tmp_path / "page.jpg").write_text("<html>")

        images = folder(tmp_path, labelled=False, skip_bad=True)

        assert images.names == ("good.png",)
        assert len(images.skipped) == 1
        assert images.skipped[0].startswith("page.jpg: it is not a picture")

    def test_skipping_every_file_is_an_error(self, tmp_path):
        (tmp_path / "page.jpg").write_text("<html>")

        with pytest.raises(DataError, match="1 of 1 images"):
            folder(tmp_path, labelled=False, skip_bad=True)

    def test_links_that_leave_the_folder_are_refused(self, tmp_path):
        save(tmp_path / "inside/a.png")
        save(tmp_path / "outside/b.png")
        (tmp_path / "inside/link.png").symlink_to(tmp_path / "outside/b.png")
        (tmp_path / "inside/more").symlink_to(tmp_path / "outside")

        with pytest.raises(DataError) as caught:
            folder(tmp_path / "inside", labelled=False)

        assert caught.value.problems == ("link.png: it is a link that leaves the folder", "more: it is a link to a folder")

    def test_a_link_within_the_folder_is_a_picture_also_when_the_folder_is_a_link(self, tmp_path):
        save(tmp_path / "real/a.png")
        (tmp_path / "real/b.png").symlink_to("a.png")
        (tmp_path / "link").symlink_to("real")

        assert folder(tmp_path / "link", labelled=False).names == ("a.png", "b.png")

    def test_a_dangling_link_and_a_pipe_are_bad_files(self, tmp_path):
        save(tmp_path / "a.png")
        (tmp_path / "dangling.png").symlink_to("gone.png")
        os.mkfifo(tmp_path / "pipe.png")

        images = folder(tmp_path, labelled=False, skip_bad=True)

        assert images.skipped == ("dangling.png: it is not a regular file", "pipe.png: it is not a regular file")

    def test_names_that_are_not_utf8_work_and_can_be_printed(self, tmp_path):
        strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
        save(strange / os.fsdecode(b"caf\xe9.png"))

        images = folder(tmp_path, labelled=True)

        assert images.names == ("\\xff\\xfe/caf\\xe9.png",)
        assert images.classes == ("\\xff\\xfe",)
        assert images.array(0, PLAIN).shape == (3, 4, 4)
        assert images.digest
        (images.names[0] + images.origin).encode()


class TestLabels:
    CLASSES = ("tench", "great white shark", "crane", "hen", "crane")
    SYNSETS = ("n01440764", "n01484850", "n02012849", "n01514859", "n03126707")

    def labels(self, root: Path, *folders: str) -> list[int]:
        for name in folders:
            save(root / name / "a.png")
        images = folder(root, classes=self.CLASSES, synsets=self.SYNSETS, labelled=True)
        assert images.classes == self.CLASSES
        assert images.labels is not None
        return images.labels.tolist()

    def problems(self, root: Path, *folders: str) -> DataError:
        with pytest.raises(DataError) as caught:
            self.labels(root, *folders)
        return caught.value

    def test_sub_folders_are_matched_by_name_and_not_every_class_needs_one(self, tmp_path):
        assert self.labels(tmp_path, "hen", "tench") == [3, 0]

    def test_case_and_underscores_do_not_matter_where_no_name_matches_exactly(self, tmp_path):
        assert self.labels(tmp_path, "Great_White_Shark", "HEN") == [1, 3]

    def test_a_name_that_macos_wrote_decomposed_is_the_same_name(self, tmp_path):
        save(tmp_path / unicodedata.normalize("NFD", "café") / "a.png")

        images = folder(tmp_path, classes=["bar", unicodedata.normalize("NFC", "café")], labelled=True)

        assert images.labels is not None
        assert images.labels.tolist() == [1]

    def test_an_exact_name_wins_over_one_that_differs_in_case(self, tmp_path):
        save(tmp_path / "Polish/a.png")

        images = folder(tmp_path, classes=["polish", "Polish"], labelled=True)

        assert images.labels is not None
        assert images.labels.tolist() == [1]

    def test_synsets_are_matched_by_their_position(self, tmp_path):
        assert self.labels(tmp_path, "n01484850", "n03126707", "hen") == [3, 1, 4]

    def test_pictures_may_lie_deeper_than_their_class_folder(self, tmp_path):
        assert self.labels(tmp_path, "hen/farm/monday") == [3]

    def test_a_name_that_two_classes_have_is_refused_and_the_synsets_are_offered(self, tmp_path):
        error = self.problems(tmp_path, "crane", "hen")

        assert error.problems == ("crane/ may be any of the classes 2 (crane), 4 (crane): name it n02012849 or n03126707",)

    def test_a_name_that_fits_two_classes_loosely_is_refused(self, tmp_path):
        save(tmp_path / "POLISH/a.png")

        with pytest.raises(DataError, match=r"0 \(polish\), 1 \(Polish\)"):
            folder(tmp_path, classes=["polish", "Polish"], labelled=True)

    def test_every_folder_that_is_no_class_is_listed_beside_names_that_are(self, tmp_path):
        error = self.problems(tmp_path, "hen", "wolf", "lamb")

        assert error.problems == ("lamb/ is none of the model's classes", "wolf/ is none of the model's classes")
        assert "tench" in error.fix
        assert "n01440764" in error.fix

    def test_as_many_folders_as_classes_is_no_reason_to_guess(self, tmp_path):
        assert len(self.problems(tmp_path, "0", "1", "2", "3", "4").problems) == 5

    def test_a_picture_in_no_sub_folder_has_no_class(self, tmp_path):
        save(tmp_path / "stray.png")

        assert self.problems(tmp_path, "hen").problems == ("stray.png lies in no sub-folder, so it has no class",)

    def test_a_folder_without_pictures_needs_no_class(self, tmp_path):
        (tmp_path / "notes").mkdir()

        assert self.labels(tmp_path, "hen") == [3]

    def test_without_classes_the_sorted_folder_names_are_the_classes(self, tmp_path):
        for name in ("bees/1.png", "ants/2.png", "bees/0.png"):
            save(tmp_path / name)

        images = folder(tmp_path, labelled=True)

        assert images.classes == ("ants", "bees")
        assert images.labels is not None
        assert images.labels.tolist() == [0, 1, 1]

    def test_without_classes_an_empty_folder_would_shift_the_labels_and_is_refused(self, tmp_path):
        save(tmp_path / "bees/a.png")
        (tmp_path / "ants").mkdir()

        with pytest.raises(DataError, match="ants/ holds no pictures"):
            folder(tmp_path, labelled=True)

    def test_labels_stay_with_their_pictures_when_a_bad_file_is_left_out(self, tmp_path):
        save(tmp_path / "ants/b.png")
        save(tmp_path / "bees/a.png")
        (tmp_path / "ants/a.png").write_text("<html>")

        images = folder(tmp_path, labelled=True, skip_bad=True)

        assert images.labels is not None
        assert list(zip(images.names, images.labels, strict=True)) == [("ants/b.png", 0), ("bees/a.png", 1)]


@pytest.fixture
def seven(tmp_path: Path) -> Images:
    for index in range(7):
        save(tmp_path / f"seven/{index}.png", picture(seed=index))
    return folder(tmp_path / "seven", labelled=False)


class TestImages:
    def test_batches_hold_every_picture_in_order_and_the_last_holds_the_rest(self, seven):
        batches = list(seven.batches(IMAGENET, 3))

        assert [batch.shape for batch in batches] == [(3, 3, 32, 32), (3, 3, 32, 32), (1, 3, 32, 32)]
        assert all(batch.dtype == np.float32 and batch.flags.c_contiguous for batch in batches)
        np.testing.assert_array_equal(np.concatenate(batches), np.stack([seven.array(index, IMAGENET) for index in range(7)]))

    def test_the_batch_size_does_not_change_the_numbers(self, seven):
        np.testing.assert_array_equal(
            np.concatenate(list(seven.batches(IMAGENET, 1))), np.concatenate(list(seven.batches(IMAGENET, 100)))
        )

    def test_a_batch_of_no_images_is_refused(self, seven):
        with pytest.raises(ValueError, match="batch of 0"):
            next(seven.batches(IMAGENET, 0))

    def test_memory_does_not_grow_with_the_number_of_pictures(self, seven):
        def peak(images: Images) -> int:
            tracemalloc.start()
            for _ in images.batches(IMAGENET, 4):
                pass
            highest = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return highest

        one_input = 3 * 32 * 32 * 4
        few, many = peak(seven.take([0] * 8)), peak(seven.take([0] * 200))

        assert many - few < 20 * one_input

    def test_a_consumer_that_stops_early_leaves_no_threads_behind(self, seven):
        import threading

        before = threading.active_count()
        batches = seven.batches(IMAGENET, 2)
        next(batches)

        batches.close()

        assert threading.active_count() == before

    def test_a_picture_damaged_behind_its_header_surfaces_with_its_name(self, seven):
        truncate(seven.sources[4])

        with pytest.raises(DataError, match=r"4\.png") as caught:
            list(seven.batches(IMAGENET, 3))

        assert "truncated" in caught.value.why
        assert "--skip-bad-images" in caught.value.fix

    def test_checking_finds_every_damaged_picture_before_the_work_starts(self, seven):
        truncate(seven.sources[4])
        truncate(seven.sources[1])

        with pytest.raises(DataError, match="2 of 7 images") as caught:
            seven.checked(IMAGENET)

        assert [problem.split(":")[0] for problem in caught.value.problems] == ["1.png", "4.png"]

    def test_checking_may_leave_damaged_pictures_out_and_list_them(self, seven):
        truncate(seven.sources[4])

        checked = seven.checked(IMAGENET, skip_bad=True)

        assert checked.names == ("0.png", "1.png", "2.png", "3.png", "5.png", "6.png")
        assert len(checked.skipped) == 1
        assert checked.skipped[0].startswith("4.png: ")
        assert sum(len(batch) for batch in checked.batches(IMAGENET, 4)) == 6

    def test_checking_a_set_of_which_nothing_is_left_is_an_error(self, seven):
        truncate(seven.sources[4])

        with pytest.raises(DataError, match="1 of 1 images"):
            seven.take([4]).checked(IMAGENET, skip_bad=True)

    def test_checking_reports_its_progress(self, seven):
        seen: list[tuple[int, int]] = []

        seven.take(list(range(7)) * 10).checked(IMAGENET, progress=lambda done, total: seen.append((done, total)))

        assert seen == [(32, 70), (64, 70), (70, 70)]

    def test_the_digest_is_that_of_the_contents_and_not_of_the_place(self, seven, tmp_path):
        digest = seven.digest
        (tmp_path / "seven").rename(tmp_path / "moved")

        assert folder(tmp_path / "moved", labelled=False).digest == digest

    def test_one_flipped_bit_changes_the_digest(self, seven):
        before = seven.digest
        content = bytearray(seven.sources[3].read_bytes())
        content[-20] ^= 1
        seven.sources[3].write_bytes(content)

        assert folder(seven.sources[3].parent, labelled=False).digest != before

    def test_names_labels_classes_and_order_are_part_of_the_digest(self, tmp_path):
        save(tmp_path / "ants/a.png")
        save(tmp_path / "bees/b.png", picture(seed=1))
        images = folder(tmp_path, labelled=True)

        others = (
            images.take([1, 0]),
            replace(images, names=("ants/a.png", "bees/c.png")),
            replace(images, labels=np.array([1, 0])),
            replace(images, classes=("ants", "wasps")),
            folder(tmp_path, labelled=False),
        )

        assert len({images.digest, *(other.digest for other in others)}) == 6

    def test_taking_keeps_names_labels_and_pictures_together(self, tmp_path):
        for name in ("ants/a.png", "bees/b.png", "bees/c.png"):
            save(tmp_path / name, picture(seed=len(name) + ord(name[5])))
        images = folder(tmp_path, labelled=True)

        taken = images.take([2, 0])

        assert taken.names == ("bees/c.png", "ants/a.png")
        assert taken.labels is not None
        assert taken.labels.tolist() == [1, 0]
        np.testing.assert_array_equal(taken.array(0, PLAIN), images.array(2, PLAIN))

    def test_labels_cannot_be_changed(self, tmp_path):
        save(tmp_path / "ants/a.png")
        labels = folder(tmp_path, labelled=True).labels

        with pytest.raises(ValueError, match="read-only"):
            labels[0] = 3

    def test_a_thumbnail_is_a_png_whose_longer_side_is_what_was_asked_for(self, seven):
        thumbnail = Image.open(io.BytesIO(seven.thumbnail(0, side=24)))

        assert (thumbnail.format, thumbnail.size) == ("PNG", (24, 18))

    def test_small_pictures_are_enlarged_with_sharp_pixels(self):
        test = digits(0).test

        thumbnail = Image.open(io.BytesIO(test.thumbnail(0)))

        assert thumbnail.size == (96, 96)
        np.testing.assert_array_equal(np.asarray(thumbnail)[6::12, 6::12], test.sources[0])


class TestCalibrationSubset:
    def images(self, count: int) -> Images:
        return Images(
            names=tuple(f"{index:04d}" for index in range(count)),
            labels=np.repeat(np.arange(10), count // 10),
            classes=tuple("abcdefghij"),
            skipped=(),
            origin="test",
            sources=(np.zeros((8, 8), np.uint8),) * count,
        )

    def test_the_same_seed_chooses_the_same_pictures_and_another_seed_others(self):
        images = self.images(1000)

        chosen = calibration_subset(images, 64, 0).names

        assert chosen == calibration_subset(images, 64, 0).names
        assert chosen != calibration_subset(images, 64, 1).names

    def test_the_choice_does_not_change_with_the_version_of_numpy(self):
        assert calibration_subset(self.images(100), 5, 0).names == ("0010", "0034", "0052", "0070", "0088")

    @pytest.mark.parametrize(("total", "count"), [(1000, 64), (100, 99), (70, 7), (10, 1)])
    def test_pictures_are_distinct_in_order_and_as_many_as_asked_for(self, total, count):
        names = calibration_subset(self.images(total), count, 3).names

        assert len(set(names)) == count
        assert list(names) == sorted(names)

    def test_every_class_of_a_sorted_folder_gets_its_share(self):
        labels = calibration_subset(self.images(1000), 40, 5).labels

        assert np.bincount(labels).tolist() == [4] * 10

    def test_all_pictures_are_taken_when_there_are_fewer(self):
        images = self.images(10)

        assert calibration_subset(images, 64, 0).names == images.names


class TestDigits:
    def test_the_parts_are_disjoint_and_together_all_1797_pictures(self):
        splits = digits(0)
        parts = (splits.train, splits.calibration, splits.test)

        assert [len(part) for part in parts] == [996, 257, 544]
        assert len({name for part in parts for name in part.names}) == 1797

    def test_every_part_holds_every_class_in_the_same_proportion(self):
        for part in (digits(0).train, digits(0).calibration, digits(0).test):
            shares = np.bincount(part.labels) / len(part)
            np.testing.assert_allclose(shares, 0.1, atol=0.006)
            assert part.classes == tuple("0123456789")

    def test_the_seed_alone_decides_the_split(self):
        assert digits(3).test.digest == digits(3).test.digest
        assert digits(3).test.names != digits(4).test.names

    def test_sixteen_inked_pixels_are_white_and_none_is_black(self):
        pixels = np.stack(digits(0).test.sources)

        assert (pixels.dtype, pixels.shape[1:], pixels.min(), pixels.max()) == (np.uint8, (8, 8), 0, 255)

    def test_they_become_batches_like_any_other_pictures(self):
        test = digits(0).test.take([0, 1])

        batch = next(test.batches(GREY, 2))

        np.testing.assert_array_equal(batch[:, 0], np.stack(test.sources).astype(np.float32) / np.float32(255))

    def test_a_machine_without_scikit_learn_is_told_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

        with pytest.raises(CapabilityError) as caught:
            digits(0)

        assert caught.value.fix == "pip install 'deploykit[demo]'"


class TestHoldingOut:
    labels = np.repeat([3, 0, 7], [25, 9, 1]).astype(np.int64)

    def test_a_tenth_of_each_class_and_at_least_one_is_held_out_and_nothing_is_lost(self):
        rest, held_out = to_train_and_to_hold_out(self.labels, 0)

        assert sorted([*rest, *held_out]) == list(range(len(self.labels)))
        assert [(self.labels[held_out] == label).sum() for label in (3, 0, 7)] == [2, 1, 1]
        assert all(np.all(np.diff(part) > 0) for part in (rest, held_out))

    def test_which_ones_is_the_same_everywhere_and_follows_the_seed(self):
        assert to_train_and_to_hold_out(self.labels, 0)[1].tolist() == [16, 23, 32, 34]
        assert to_train_and_to_hold_out(self.labels, 1)[1].tolist() != [16, 23, 32, 34]


def test_reading_pictures_needs_neither_torch_nor_scikit_learn():
    code = "import deploykit.data, sys; print(sorted({'torch', 'torchvision', 'sklearn', 'onnx'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
