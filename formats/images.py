"""A picture's file, decoded; and the numbers of a preprocessor_config.json.

    image = open_image("photo.jpg")                     # upright RGB, whatever it was
    table = read_pixel_table(raw, "preprocessor_config.json")       # (3, 256)

Both are read from strangers: what is broken, or asks for what is not implemented, is an InputError
that says so.
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from formats.files import InputError

# Others of Pillow's readers run programs: EPS starts Ghostscript.
IMAGE_KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]

# ---- A picture


def open_image(path: str | Path, part: tuple[int, int] | None = None) -> Image.Image:
    """Read a picture, a whole file or a `part` (offset, length in bytes) of one, as upright RGB.

    Decided here: rotation by EXIF is applied (as by transformers' load_image); transparency is
    composited on white (as by transformers 5); 16-bit grey is scaled to 8 bits (Pillow alone would
    clip it to white); of an animation the first frame is taken; only JPEG, PNG, WebP, GIF and BMP
    are opened.

    Raises:
        InputError: for what is missing, damaged, a decompression bomb, or too long."""
    name = f"{path}, bytes from {part[0]}" if part else path
    try:
        with warnings.catch_warnings():
            # Up to twice its limit of pixels Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = read_part(path, part) if part else path
            with Image.open(source, formats=IMAGE_KINDS) as image:
                rgb = to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory, not a picture") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS
        raise InputError(f"{name}: more than {limit} pixels; scale the image down") from None
    except UnidentifiedImageError:
        found = what_picture_it_may_be(path, part)
        raise InputError(f"{name}: not a JPEG, PNG, WebP, GIF or BMP image{found}") from None
    # Whatever Pillow's decoders find: truncated data, bad checksums, broken headers.
    except Exception as error:
        if "MAX_TEXT" in str(error):  # its limit for what compressed texts unpack to
            found = "the picture's metadata unpack to more than Pillow allows"
            advice = "it may be whole: save it again without metadata"
            raise InputError(f"{name}: {found}; {advice}") from None
        raise InputError(f"{name}: the image is damaged ({error})") from None
    # Resizing its short side to a model's input would take gigabytes.
    if max(rgb.size) > 200 * min(rgb.size):
        raise InputError(f"{name}: {rgb.width} x {rgb.height} pixels are too long for an image")
    return rgb


# How files begin that are taken for pictures, or are pictures of another kind.
OTHER_KINDS = {
    b"version https": "a Git LFS pointer: run `git lfs pull`",
    b"<": "an SVG or a web page: a failed download?",
    b"{": "JSON: a failed download?",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
    b"\0\5\x16\7": "what a Mac keeps beside a file",
}
BRANDS = {b"avif": "an AVIF", b"heic": "a HEIC", b"heix": "a HEIC", b"mif1": "a HEIC"}


def what_picture_it_may_be(path: str | Path, part: tuple[int, int] | None) -> str:
    """What a file that is no picture for us often turns out to be, for the end of a message."""
    head = read_part(path, part or (0, 16)).read(16)
    kind = "empty" if not head else None
    for beginning, name in OTHER_KINDS.items():
        if head.startswith(beginning):
            kind = name
    if head[4:8] == b"ftyp":
        kind = BRANDS.get(head[8:12], kind)
    if kind is None:
        return ""
    advice = "; save it as JPEG" if kind.split()[-1] in ("TIFF", "AVIF", "HEIC", "PDF") else ""
    return f" (it is {kind}{advice})"


def read_part(path: str | Path, part: tuple[int, int]) -> io.BytesIO:
    offset, length = part
    with open(path, "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes -> 8-bit RGB, transparency on white."""
    # Pillow opens 16-bit grey PNGs as either mode, by its version.
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.uint32) // 257  # 65535 becomes 255
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# ---- preprocessor_config.json


def read_field(raw: dict, key: str, convert: Callable, where: str, default=None):
    """raw[key], as `convert` reads it. Raises InputError with the key and what was found."""
    value = raw.get(key, default)
    try:
        return convert(value)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        found = "missing" if value is None else f"{value!r}, which cannot be used"
        raise InputError(f"{where}: {key} is {found}") from None


def refuse_unless(raw: dict, key: str, wanted: bool, where: str) -> None:
    """Refuse a file that switches off what we always do, or on what we never do."""
    if raw.get(key, wanted) not in (wanted, None):
        raise InputError(f"{where}: {key} is {raw[key]!r}, which is not implemented")


def read_sizes(raw: dict, where: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """What a picture is resized to, and the (height, width) that the crop leaves of it."""
    resized = read_field(raw, "size", edge_lengths, where)
    crop = None
    # Files of SigLIP have neither field; a crop_size without the switch is meant.
    if raw.get("do_center_crop", "crop_size" in raw):
        crop = read_field(raw, "crop_size", edge_lengths, where)
        # With a crop, one number is the shortest edge: so old CLIP configs write it.
        if type(raw["size"]) is int:
            resized = resized[:1]

    size = crop or resized
    # Both edges of any resized picture are at least this long.
    smallest = resized if len(resized) == 2 else resized * 2
    if len(size) == 1 or size[0] > smallest[0] or size[1] > smallest[1]:
        found = f"size {raw['size']!r} and crop_size {crop}"
        raise InputError(f"{where}: {found} do not give images of one size")
    return resized, size


def edge_lengths(value: int | dict) -> tuple[int, ...]:
    """(height, width), or (shortest edge,) where that alone is given. An integer is a square."""
    if type(value) is int:
        lengths = (value, value)
    else:
        given = {key: length for key, length in value.items() if length is not None}
        if given.keys() == {"shortest_edge"}:
            lengths = (given["shortest_edge"],)
        else:
            lengths = (given["height"], given["width"])
    for length in lengths:
        # `type`, since True is an int too. The limit keeps a stranger's file from taking gigabytes.
        if type(length) is not int or not 0 < length <= 4096:
            raise ValueError(f"{length!r} is not a length in pixels")
    return lengths


def three_numbers(value: list[float]) -> np.ndarray:
    return np.array(value, np.float32).reshape(3)


def read_pixel_table(raw: dict, where: str) -> np.ndarray:
    """What each of a pixel's 256 levels becomes in each channel, (3, 256) fp32.

    Rescaling and normalising look at one value at a time, so a table holds all there is to know.
    The roundings are transformers' own: a product in fp64, the rest in fp32."""
    mean = read_field(raw, "image_mean", three_numbers, where)
    std = read_field(raw, "image_std", three_numbers, where)
    factor = 1.0
    if raw.get("do_rescale", True):
        factor = read_field(raw, "rescale_factor", float, where, default=1 / 255)
    with np.errstate(all="ignore"):
        rescaled = (np.arange(256, dtype=np.float64) * factor).astype(np.float32)  # (256,)
        table = (rescaled - mean[:, None]) / std[:, None]  # (3, 256)
    # An infinite std would pass unseen: it makes every value 0.
    if not np.isfinite(table).all() or not np.isfinite(std).all():
        raise InputError(
            f"{where}: rescale_factor, image_mean and image_std do not give finite pixel values"
        )
    return table
