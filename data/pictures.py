"""An image file of any origin -> pixels; and pixels -> one PNG to look at.

Image files may come from strangers, so they are read with care. Only common formats are tried. The
number of pixels is checked before any pixel is decoded. A file that cannot be read is refused with
a reason. The information in a file is respected: orientation, palette, transparency (the picture
is laid on white), bit depth and printer's inks (CMYK).

The picture becomes a square as in CLIP (Radford et al. 2021), with the same pixels as the
library transformers gives: the short side is resized to `size` with a bicubic filter, the long
side is scaled by the same factor and rounded down, and the square in the middle is cut out. Left
out: colour profiles, so that photos with a wide gamut look a little pale.
"""

import contextlib
import importlib
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.Image import open as open_image
from PIL.PngImagePlugin import PngInfo

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
PHONES = ("AVIF", "HEIF")  # formats of phones: Pillow may read the first, pillow-heif the second
Source = str | Path | BinaryIO  # a picture file, or its open content
MAX_PIXELS = 100_000_000
COLORED = 32  # a pixel whose channels differ by more than this is not grey
# The fonts that come with matplotlib. This finds them without importing matplotlib.
FONTS = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"


class Record(NamedTuple):
    """A picture with its captions."""

    image: np.ndarray  # uint8 (H, W, C)
    captions: tuple[str, ...]  # training reads the first one
    label: str  # the thing that is shown, without the way in which it is shown
    split: str


# ---- formats -------------------------------------------------------------------------------------


@cache
def readable() -> tuple[str, ...]:
    """FORMATS, and those of PHONES that can be read here."""
    if find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return (*FORMATS, *(name for name in PHONES if name in Image.OPEN))


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of picture files, in lower case: those of all formats that Pillow reads, and of
    PHONES. A file of a format that is not `readable` is a picture, too, and refused by name."""
    known = Image.registered_extensions()
    return frozenset({".heic", ".heif", ".avif"}.union(s for s in known if known[s] in Image.OPEN))


def unreadable(source: Source) -> str:
    """Why a file is of no format that can be read here."""
    reason = f"not an image in one of the formats {', '.join(readable())}"
    if str(source).lower().endswith((".heic", ".heif")):
        reason += "; pip install pillow-heif"
    return reason


# ---- reading -------------------------------------------------------------------------------------


def flatten(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: 8 bits per channel, opaque."""
    # Grey with more than 8 bits: Pillow would clip it, so scale it here.
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0, posinf=1, neginf=0)
        largest = 1 if image.mode == "F" else 65535
        white = max(largest, grey.max())
        image = Image.fromarray((grey.clip(0, white) / white * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def is_regular(path: Path) -> bool:
    """Whether opening a path gives its content at once, or an error: a pipe may wait for ever."""
    return path.is_file() or path.is_dir() or not path.exists()


def load(source: Source, most_pixels: int = MAX_PIXELS) -> tuple[Image.Image, int]:
    """The first picture of a file, upright and flat, and the number of pictures in the file.

    An animation has several pictures (frames), and so may a document (pages). Raises ValueError
    with the reason if that fails.
    """
    return convert(source, flatten, most_pixels)


def opacity(source: Source, most_pixels: int = MAX_PIXELS) -> Image.Image | None:
    """How opaque the first picture of a file is, upright, in grey: black where nothing is.

    None if the file says nothing about it. Raises ValueError as `load` does.
    """

    def alpha(image: Image.Image) -> Image.Image | None:
        return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None

    return convert(source, alpha, most_pixels)[0]


def convert(source: Source, change: Callable, most_pixels: int) -> tuple[Any, int]:
    """change(first picture of a file, upright), and the number of pictures in the file.

    Raises ValueError with the reason if that fails.
    """
    if isinstance(source, (str, Path)) and not is_regular(Path(source)):
        raise ValueError("a pipe, a socket or a device")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which do no harm
            with open_image(source, formats=readable()) as image:
                pixels = image.width * image.height
                if pixels > most_pixels:
                    raise Image.DecompressionBombError
                if pixels:
                    return change(ImageOps.exif_transpose(image)), getattr(image, "n_frames", 1)
                reason = "it has no pixels"
    except Image.DecompressionBombError:
        reason = f"more than {most_pixels:,} pixels, make it smaller"
    except UnidentifiedImageError:
        reason = unreadable(source)
    except Exception as error:  # decoders raise all kinds, and one bad file must not stop the rest
        reason = getattr(error, "strerror", None) or "truncated or damaged"
    raise ValueError(reason)


def middle_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size`, and cut out the middle: (size, size) pixels.

    Raises ValueError if the other side would become too long.
    """
    short = min(image.size)
    width = size * image.width // short
    height = size * image.height // short
    if width * height > MAX_PIXELS:
        raise ValueError("far too long for its width, crop it")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def is_colored(image: np.ndarray) -> bool:
    """Whether an image, uint8 (H, W, 3), has a pixel that is far from any grey."""
    return bool(np.ptp(image, axis=2).max() > COLORED)


def to_grey(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (H, W, 1)."""
    return np.array(Image.fromarray(image).convert("L"))[:, :, None]


def decode(path: str | Path, size: int, channels: int) -> tuple[np.ndarray, int]:
    """The first picture of a file, uint8 (size, size, channels), and the number of pictures.

    One channel is grey, three are colour. Raises ValueError with the reason, without the path.
    """
    image, count = load(path)
    square = np.array(middle_square(image, size))
    if channels == 1:
        square = to_grey(square)
    return square, count


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Add the path to the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} cannot be used as an image: {error}") from error


def read(path: str | Path, size: int, channels: int) -> np.ndarray:
    """The first picture of a file, uint8 (size, size, channels).

    Raises ValueError that names the file. Warns if colours are lost.
    """
    with named(path):
        image, _ = decode(path, size, 3)
    if channels != 1:
        return image
    if is_colored(image):
        warnings.warn(f"{path} is in colour, the model in grey: read as grey", stacklevel=2)
    return to_grey(image)


def size_of(path: str | Path) -> tuple[int, int]:
    """The width and height of a picture in pixels. Raises ValueError that names the file."""
    with named(path):
        image, _ = load(path)
        return image.size


# ---- looking -------------------------------------------------------------------------------------

TITLE_SIZE = 10  # pixels
TITLE_LINES = 6  # a longer title is cut
TITLE_WIDTH = 0.6 * TITLE_SIZE  # pixels of an average character
TILE = 64  # pixels: images are enlarged at least to this width
TITLED = 96  # the same, for images with titles


SOFTWARE = "tinyfm"  # the program's name in the PNG files that it writes


def made_here() -> PngInfo:
    """The note in a PNG file that says which program made it."""
    note = PngInfo()
    note.add_text("Software", SOFTWARE)
    return note


def is_made_here(path: str | Path) -> bool:
    """Whether this program drew this file, by the note in it."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError):  # the last of Pillow, for a broken PNG
        return False


def check_free(path: str | Path) -> None:
    """Raise ValueError if no picture may go to this path: a file of others, or in no folder."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
    if path.exists() and not is_made_here(path):
        raise ValueError(f"{path} exists, and tinyfm did not draw it: choose another name")


def save(image: np.ndarray, path: str | Path) -> None:
    """Write a PNG of one image, uint8 (H, W, C) with C 1 or 3."""
    picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
    picture.save(path, format="PNG", pnginfo=made_here())


def save_grid(
    images: np.ndarray, path: str | Path, columns: int, titles: Sequence[str] | None = None
) -> None:
    """Write a PNG of the images, uint8 (B, H, W, C) with C 1 or 3, row by row.

    Small images are enlarged: each pixel becomes a square. A title stands in small letters right
    above its image. A title of more than TITLE_LINES lines is cut.
    """
    n, height, width, channels = images.shape

    # The sizes of a tile, and the lines of each title.
    zoom = math.ceil((TITLED if titles else TILE) / width)
    gap = 6 if titles else 1
    tile = width * zoom
    lines = []
    for title in titles or ():
        characters = int(tile / TITLE_WIDTH)
        lines.append(textwrap.wrap(title, characters, max_lines=TITLE_LINES, placeholder="…"))
    line_height = TITLE_SIZE + 2
    head = max(map(len, lines), default=0) * line_height
    step_x = tile + gap
    step_y = height * zoom + head + gap

    # Draw the tiles.
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", TITLE_SIZE)
    grid = Image.new("RGB", (columns * step_x + gap, math.ceil(n / columns) * step_y + gap), "grey")
    pen = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x = gap + i % columns * step_x
        y = gap + i // columns * step_y
        picture = Image.fromarray(image if channels == 3 else image[:, :, 0])
        picture = picture.resize((tile, height * zoom), Image.Resampling.NEAREST)
        grid.paste(picture, (x, y + head))
        if titles:
            top = y + head - line_height * len(lines[i])  # short titles touch their image too
            pen.multiline_text((x, top), "\n".join(lines[i]), fill="white", font=font, spacing=1)
    grid.save(path, format="PNG", pnginfo=made_here())
