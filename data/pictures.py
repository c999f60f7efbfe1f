"""One image file -> pixels, whoever made it; and pixels -> one PNG to look at.

Reading is where other people's bytes come in. Only common formats are tried, the pixels are counted
before any is decoded, and what cannot be read is refused with a reason. What a file says of itself
is heeded: orientation, palette, transparency (laid on white), depth, printer's ink (CMYK).

The picture becomes a square as CLIP wants it (Radford et al. 2021) and transformers computes it:
the short side is made `size` with a bicubic filter, the long side scaled alike and rounded down,
and the middle square cut out. Left out: colour profiles, so that wide-gamut photos pale a little.
"""

import contextlib
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.Image import open as open_image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 100_000_000
# matplotlib's fonts, found without importing it.
FONTS = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"


class Record(NamedTuple):
    """A picture and what is said of it."""

    image: np.ndarray  # uint8 (H, W, C)
    captions: tuple[str, ...]  # the first is the one that training reads
    label: str  # what it shows, without how
    split: str


# ---- reading -------------------------------------------------------------------------------------


def flatten(image: Image.Image) -> Image.Image:
    """Pixels of any kind as RGB: 8 bits a channel, opaque."""
    if image.mode.startswith(("I", "F")):  # deep grey, which Pillow would clip instead of scale
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0, posinf=1, neginf=0)
        white = max(1 if image.mode == "F" else 65535, grey.max())
        image = Image.fromarray((grey.clip(0, white) / white * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load(path: str | Path) -> tuple[Image.Image, int]:
    """The first picture of a file, upright and flat, and how many there are (an animation's frames,
    a document's pages). Raises ValueError with the reason where that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which do no harm
            with open_image(path, formats=FORMATS) as image:
                pixels = image.width * image.height
                if pixels > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if pixels:
                    return flatten(ImageOps.exif_transpose(image)), getattr(image, "n_frames", 1)
                reason = "it has no pixels"
    except Image.DecompressionBombError:
        reason = f"more than {MAX_PIXELS:,} pixels, make it smaller"
    except UnidentifiedImageError:
        reason = f"not an image in one of the formats {', '.join(FORMATS)}"
    except Exception as error:  # decoders raise all sorts, and one bad file must not stop the rest
        reason = getattr(error, "strerror", None) or "truncated or damaged"
    raise ValueError(reason)


def middle_square(image: Image.Image, size: int) -> Image.Image:
    """The middle of a picture whose short side is made `size`: (size, size) pixels."""
    width, height = (size * side // min(image.size) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError("far too long for its width, crop it")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def is_colored(image: np.ndarray) -> bool:
    """Is there a pixel of uint8 (H, W, 3) that is far from any grey?"""
    return bool(np.ptp(image, axis=2).max() > 32)


def to_grey(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (H, W, 1)."""
    return np.array(Image.fromarray(image).convert("L"))[:, :, None]


def decode(path: str | Path, size: int, channels: int) -> tuple[np.ndarray, int]:
    """uint8 (size, size, channels), 1 channel for grey or 3 for colour, and the number of pictures
    in the file, of which this is the first. Raises ValueError with nothing but the reason."""
    image, count = load(path)
    square = np.array(middle_square(image, size))
    return to_grey(square) if channels == 1 else square, count


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Let an error name the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} cannot be used as an image: {error}") from error


def read(path: str | Path, size: int, channels: int) -> np.ndarray:
    """The picture alone, as `decode` has it. Raises ValueError that names the file; warns where
    colours are lost."""
    with named(path):
        image, _ = decode(path, size, 3)
    if channels == 1 and is_colored(image):
        warnings.warn(f"{path} is in colour, the model in grey: read as grey", stacklevel=2)
    return to_grey(image) if channels == 1 else image


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture in pixels. Raises ValueError that names the file."""
    with named(path):
        return load(path)[0].size


# ---- looking -------------------------------------------------------------------------------------

TITLE_SIZE, TITLE_LINES = 10, 6
TILE = 96  # the least width of a picture with a title


def save(image: np.ndarray, path: str | Path) -> None:
    """Write a PNG of one image, uint8 (H, W, C) with C 1 or 3."""
    Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0]).save(path, format="PNG")


def save_grid(
    images: np.ndarray, path: str | Path, columns: int, titles: Sequence[str] | None = None
) -> None:
    """Write a PNG of the images, uint8 (B, H, W, C) with C 1 or 3, row by row.

    Titles are set small above the images, which are then enlarged to be wide enough for a few
    words; what does not fit in TITLE_LINES lines is cut.
    """
    n, height, width, channels = images.shape
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", TITLE_SIZE)
    zoom = math.ceil(TILE / width) if titles else 1
    tile, gap = width * zoom, 4 if titles else 1
    characters = int(tile / (0.6 * TITLE_SIZE))
    cut = {"max_lines": TITLE_LINES, "placeholder": "…"}
    lines = [textwrap.wrap(title, characters, **cut) for title in titles or ()]
    head = max(map(len, lines), default=0) * (TITLE_SIZE + 2)
    step_x, step_y = tile + gap, height * zoom + head + gap
    grid = Image.new("RGB", (columns * step_x + gap, math.ceil(n / columns) * step_y + gap), "grey")
    pen = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = gap + i % columns * step_x, gap + i // columns * step_y
        picture = Image.fromarray(image if channels == 3 else image[:, :, 0])
        picture = picture.resize((tile, height * zoom), Image.Resampling.NEAREST)
        grid.paste(picture, (x, y + head))
        if titles:
            pen.multiline_text((x, y), "\n".join(lines[i]), fill="white", font=font, spacing=1)
    grid.save(path, format="PNG")
