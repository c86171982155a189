import numpy as np
import pytest
from PIL import ImageFont

from retex_jax.data import glyphs


def fonts():
    return [ImageFont.load_default(size) for size in (40, 52)]


@pytest.mark.parametrize("colour", [False, True])
def test_render_is_seeded_and_labelled(colour):
    make = lambda seed: glyphs.render("abc", fonts(), per_class=4, seed=seed, colour=colour)  # noqa: E731
    first, again, other = make(0), make(0), make(1)
    assert first.contents.shape == ((12, 48, 48, 3) if colour else (12, 48, 48))
    assert first.contents.dtype == np.uint8
    assert first.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert first.groups.tolist() == [0, 1] * 6
    assert np.array_equal(first.contents, again.contents)
    assert not np.array_equal(first.contents, other.contents)
    assert len({image.tobytes() for image in first.contents}) == 12


def test_letters_are_dark_on_light_and_inside():
    images = glyphs.render("#", fonts(), per_class=16, seed=0, colour=False).contents.astype(float)
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    centre = images[:, 16:32, 16:32].reshape(16, -1)
    assert np.all(np.quantile(centre, 0.05, axis=1) < border.mean(1) - 20)


def test_alphabets_have_no_repeats():
    assert len(set(glyphs.CYRILLIC)) == 32 and len(set(glyphs.GREEK)) == 24
