"""Generated tasks: letters rendered from open fonts under seeded random distortions.

Each style (family, slant, weight, width) is a group, so that the styles of test letters never
occur in training. The two alphabets share letter shapes and therefore look like different sources:
Cyrillic as a noisy scan of dark ink on paper, Greek as light coloured letters on dark coloured
ground.
"""

import io
import os
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from retex_jax.data.tasks import Examples
from retex_jax.data.wheels import WHEELS, read_member

Cache = str | os.PathLike | None

CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюя"
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"

# Styles of each family: the file's stem, the weights, the widths (None: no such axis).
_FAMILIES = {
    "fontpkg-noto-sans": ("NotoSans", (200, 400, 600, 850), (65, 100)),
    "fontpkg-ibm-plex-sans": ("IBMPlexSans", (200, 350, 500, 700), (75, 100)),
    "fontpkg-rubik": ("Rubik", (320, 500, 700, 880), (None,)),
}

_SIDE = 48  # of an example, in pixels
_CANVAS = 96  # of an undistorted glyph
_FONT_SIZE = 52


def cyrillic(cache: Cache = None) -> Examples:
    """Renders 32 Cyrillic letters: images uint8 [2816, 48, 48], grouped by font style."""
    names = ("fontpkg-noto-sans", "fontpkg-ibm-plex-sans", "fontpkg-rubik")
    return render(CYRILLIC, _styles(names, cache), per_class=88, seed=0, colour=False)


def greek(cache: Cache = None) -> Examples:
    """Renders 24 Greek letters: images uint8 [2832, 48, 48, 3], grouped by font style."""
    names = ("fontpkg-noto-sans", "fontpkg-ibm-plex-sans")
    return render(GREEK, _styles(names, cache), per_class=118, seed=1, colour=True)


def render(
    letters: str,
    fonts: list[ImageFont.FreeTypeFont],
    *,
    per_class: int,
    seed: int,
    colour: bool,
) -> Examples:
    """Renders letters with random rotation, shear, size, shift, blur, contrast, light and noise.

    Args:
      letters: the classes, one letter each.
      fonts: the styles; examples of each letter go through them in turn.
      per_class: examples of each letter.
      seed: of all random choices.
      colour: light ink on dark ground in random colours; False: dark grey ink on light grey.

    Returns:
      Examples with images uint8 [n, 48, 48], or [n, 48, 48, 3] with colour; the style as group.
    """
    rng = np.random.default_rng(seed)
    num = len(letters) * per_class
    labels = np.repeat(np.arange(len(letters)), per_class)
    styles = np.tile(np.arange(per_class) % len(fonts), len(letters))
    plain: dict[tuple[str, int], Image.Image] = {}
    angle = np.deg2rad(rng.uniform(-15, 15, num))
    shear = rng.uniform(-0.2, 0.2, num)
    scale = rng.uniform(0.85, 1.1, (num, 2)) * rng.uniform(0.85, 1.1, (num, 1))
    shift = rng.uniform(-3, 3, (num, 2))
    blur = rng.uniform(0.0, 1.0, num)
    ink = np.empty((num, _SIDE, _SIDE), np.float32)
    for i in range(num):
        letter = letters[labels[i]]
        key = (letter, int(styles[i]))
        if key not in plain:
            plain[key] = _plain_glyph(key[0], fonts[key[1]])
        cos, sin = np.cos(angle[i]), np.sin(angle[i])
        matrix = np.array([[cos, sin], [-sin, cos]]) @ np.array([[1, shear[i]], [0, 1]])
        matrix = np.diag(1 / scale[i]) @ matrix
        offset = _CANVAS / 2 - matrix @ (_SIDE / 2 + shift[i])
        image = plain[key].transform(
            (_SIDE, _SIDE),
            Image.Transform.AFFINE,
            (*matrix[0], offset[0], *matrix[1], offset[1]),
            Image.Resampling.BILINEAR,
        )
        ink[i] = np.asarray(image.filter(ImageFilter.GaussianBlur(float(blur[i]))))
    images = _shade(ink / 255, rng, colour)
    return Examples(images, labels, tuple(letters), styles)


def _shade(ink: np.ndarray, rng: np.random.Generator, colour: bool) -> np.ndarray:
    """Turns coverage [n, s, s] in [0, 1] into pixels: ink over ground, uneven light, noise."""
    num, side = ink.shape[:2]
    channels = 3 if colour else 1
    if colour:
        ground = rng.uniform(10, 90, (num, 3))
        front = rng.uniform(140, 250, (num, 3))
        noise = rng.uniform(2, 12, num)
    else:
        ground = rng.uniform(150, 240, (num, 1))
        front = ground - rng.uniform(70, 150, (num, 1))
        noise = rng.uniform(4, 20, num)
    ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    slope = rng.uniform(-40, 40, (num, 2, channels)).astype(np.float32)
    light = ramp[:, None, None] * slope[:, None, None, 0] + ramp[:, None] * slope[:, None, None, 1]
    cover = ink[..., None]
    pixels = ground[:, None, None].astype(np.float32) * (1 - cover)
    pixels += front[:, None, None].astype(np.float32) * cover + light
    grain = rng.standard_normal((num, side, side, 1), dtype=np.float32)
    pixels += grain * noise[:, None, None, None].astype(np.float32)
    pixels = np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
    return pixels if colour else pixels[..., 0]


def _plain_glyph(letter: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draws one letter white on black, its bounding box centred."""
    left, top, right, bottom = font.getbbox(letter)
    image = Image.new("L", (_CANVAS, _CANVAS))
    corner = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, letter, fill=255, font=font)
    return image


def _styles(names: tuple[str, ...], cache: Cache) -> list[ImageFont.FreeTypeFont]:
    """Opens every style of the named wheels: upright and italic, each weight and width."""
    fonts = []
    for name in names:
        file, weights, widths = _FAMILIES[name]
        tags = "wght" if widths == (None,) else "wdth,wght"
        for slant in ("", "-Italic"):
            data = read_member(WHEELS[name], f"{file}{slant}[{tags}].ttf", cache)
            for weight, width in product(weights, widths):
                font = ImageFont.truetype(io.BytesIO(data), _FONT_SIZE)
                axes = [axis["name"] for axis in font.get_variation_axes()]
                values = {b"Weight": weight, b"Width": width}
                font.set_variation_by_axes([values[axis] for axis in axes])
                fonts.append(font)
    return fonts
