"""The thirty vision data sets of the papers: what they are, where they are had, and how they are split.

List and order: ReTeX, arXiv:2606.26902, section 5.1. What is not said here is read from the source itself: the names
of many classes, and the splits of a data set that comes with them.

Splits follow the task-vectors code (github.com/mlfoundations/task_vectors, issue 1) where data sets have no
single published one: DTD trains on the train and validation parts of its first split; SUN397 has the first of
its ten partitions; EuroSAT is drawn at random as 21600 / 2700 / 2700, and RESISC45 has the lists of
"remote sensing representations" (18900 / 6300 / 6300), or, without them, a random draw of that size. That code's own
draw of EuroSAT was never published: ours is another one, of our seed.

Licences are what the authors state, where we found that. "None found" is not a permission; what others state of a data
set, such as the cards of the Hugging Face hub, the table of torchgeo and mteb, is named beside it. Pages of Kaggle
could not be read: what is said of them comes from others who cite them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from retex_jax.data import archives
from retex_jax.data.archives import Archive

_PHOTO = ("a photo of a {}.", "an image that shows a {}.")
_DIGIT = ("a picture of the number {}.", "the digit {}.")
_LETTER = ("a picture of the handwritten character {}.", "the character {}.")


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
      name: as the public checkpoints have it.
      num_classes: 0 where it depends on the version.
      where: page or archive of the authors.
      licence: of the authors, or that none was found, with what others state.
      tfds: name and configuration in tensorflow-datasets; "" if it has none.
      hub: OWNER/NAME or OWNER/NAME:CONFIGURATION on the Hugging Face hub; "" if we know of none that
        it offers as parquet.
      train: the splits of tfds and of the hub that are trained on.
      test: those that are tested on; () if all are in one, which is then split.
      shares: of the validation and the test part, where it is split here.
      num_test: test examples as published or as split here; 0 where no one number is right.
      size_note: what there is to say of `num_test`, where it depends on the source.
      readable: label of the source to words, where the label itself is none.
      templates: prompts with "{}" for the class.
      archives: that hold it as image folders, with published checksums; () if we know of none. What
        tensorflow-datasets and the hub bring is checked by them.
    """

    name: str
    num_classes: int
    where: str
    licence: str
    tfds: str = ""
    hub: str = ""
    train: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    test: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shares: tuple[float, float] = (0.1, 0.2)
    num_test: int = 0
    size_note: str = ""
    readable: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = _PHOTO
    archives: tuple[Archive, ...] = ()

    def splits(self, source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The splits of "tfds" or "hub" that are trained and tested on."""
        return self.train.get(source, ("train",)), self.test.get(source, ("test",))


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS = {str(i): f"{i} ({word})" for i, word in enumerate(_NUMBERS)}
_ONE = {"tfds": ()}
_BOTH = ("train", "validation")

# The signs by ClassId of the German benchmark (Stallkamp et al., 2011), described in our words.
_SPEEDS = (20, 30, 50, 60, 70, 80)
_SIGNS = (
    *(f"sign of a speed limit of {speed} km/h" for speed in _SPEEDS),
    "sign that ends the speed limit of 80 km/h",
    *(f"sign of a speed limit of {speed} km/h" for speed in (100, 120)),
    "sign that forbids overtaking",
    "sign that forbids trucks to overtake",
    "sign that gives right of way at the next crossing",
    "diamond sign of a priority road",
    "sign to give way",
    "stop sign",
    "round sign that closes the road to all vehicles",
    "sign that closes the road to trucks",
    "no entry sign",
    "warning sign of a general danger",
    "warning sign of a bend to the left",
    "warning sign of a bend to the right",
    "warning sign of a double bend",
    "warning sign of a bumpy road",
    "warning sign of a slippery road",
    "warning sign of a road that narrows on the right",
    "warning sign of road works",
    "warning sign of traffic lights",
    "warning sign of pedestrians",
    "warning sign of children",
    "warning sign of bicycles",
    "warning sign of ice and snow",
    "warning sign of wild animals",
    "sign that ends all limits",
    "sign to turn right ahead",
    "sign to turn left ahead",
    "sign to go straight ahead only",
    "sign to go straight ahead or right",
    "sign to go straight ahead or left",
    "sign to keep right",
    "sign to keep left",
    "roundabout sign",
    "sign that ends the ban on overtaking",
    "sign that ends the ban on overtaking by trucks",
)
_OF_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_OF_STL10 = "airplane bird car cat deer dog horse monkey ship truck"


def _numbered(words: str) -> dict[str, str]:
    return {str(i): word for i, word in enumerate(words.split())}


_ALL = (
    DataSet(
        "sun397",
        397,
        "vision.princeton.edu/projects/2010/SUN",
        "none found; mteb: not specified",
        num_test=19_850,
        tfds="sun397/standard-part1-120k",
        hub="tanganke/sun397",
        templates=("a photo of a {}.", "a photo taken at a {}."),
        archives=archives.SUN397,
    ),
    DataSet(
        "stanford-cars",
        196,
        "Krause et al., 3DRR 2013",
        "none found; mteb: not specified",
        num_test=8_041,
        tfds="cars196",
        hub="tanganke/stanford_cars",
        templates=("a photo of a {}.", "a photo of a {}, a car."),
    ),
    DataSet(
        "resisc45",
        45,
        "Cheng et al., Proc. IEEE 2017; lists resisc45-{train,val,test}.txt of "
        "storage.googleapis.com/remote_sensing_representations",
        "none found; torchgeo names none either",
        num_test=6_300,
        tfds="resisc45",
        hub="tanganke/resisc45",
        test=_ONE,
        shares=(0.2, 0.2),
        templates=("an aerial photo of a {}.", "a {} seen from above."),
    ),
    DataSet(
        "eurosat",
        10,
        "github.com/phelber/EuroSAT",
        "MIT",
        num_test=2_700,
        tfds="eurosat/rgb",
        hub="tanganke/eurosat",
        test=_ONE,
        shares=(0.1, 0.1),
        readable={
            "AnnualCrop": "field of annual crops",
            "Forest": "forest",
            "HerbaceousVegetation": "land with herbaceous vegetation",
            "Highway": "highway",
            "Industrial": "industrial area",
            "Pasture": "pasture",
            "PermanentCrop": "plantation of permanent crops",
            "Residential": "residential area",
            "River": "river",
            "SeaLake": "sea or lake",
        },
        templates=("a satellite image of a {}.", "a {} seen from space."),
        archives=archives.EUROSAT,
    ),
    DataSet(
        "svhn",
        10,
        "ufldl.stanford.edu/housenumbers",
        "non-commercial use",
        num_test=26_032,
        tfds="svhn_cropped",
        hub="ufldl-stanford/svhn:cropped_digits",
        readable=_DIGITS,
        templates=("a photo of the house number {}.", *_DIGIT),
    ),
    DataSet(
        "gtsrb",
        43,
        "benchmark.ini.rub.de",
        "none found; a copy on the hub (bazyl/GTSRB) is put under GPL-3.0, mteb: not specified",
        num_test=12_630,
        hub="tanganke/gtsrb",
        readable={str(i): words for i, words in enumerate(_SIGNS)},
        templates=("a photo of a {}.", "a traffic sign by the road: a {}."),
    ),
    DataSet(
        "mnist",
        10,
        "LeCun et al., 1998",
        "none found; Keras states CC BY-SA 3.0, the card on the hub MIT",
        num_test=10_000,
        tfds="mnist",
        hub="ylecun/mnist",
        readable=_DIGITS,
        templates=_DIGIT,
    ),
    DataSet(
        "dtd",
        47,
        "www.robots.ox.ac.uk/~vgg/data/dtd",
        "for research",
        num_test=1_880,
        tfds="dtd",
        hub="tanganke/dtd",
        train={"tfds": _BOTH},
        templates=("a photo of a {} texture.", "a surface that looks {}."),
        archives=archives.DTD,
    ),
    DataSet(
        "cifar100",
        100,
        "www.cs.toronto.edu/~kriz/cifar.html",
        "none found; the card on the hub: unknown",
        num_test=10_000,
        tfds="cifar100",
        hub="tanganke/cifar100",
        templates=("a photo of a {}.", "a small, blurred photo of a {}."),
    ),
    DataSet(
        "stl10",
        10,
        "cs.stanford.edu/~acoates/stl10",
        "none found; mteb: not specified; the images are ImageNet's",
        num_test=8_000,
        tfds="stl10",
        hub="tanganke/stl10",
        readable=_numbered(_OF_STL10),
    ),
    DataSet(
        "oxford_flowers102",
        102,
        "www.robots.ox.ac.uk/~vgg/data/flowers/102",
        "none found; mteb: not specified",
        num_test=6_149,
        tfds="oxford_flowers102",
        hub="dpdl-benchmark/oxford_flowers102",
        train={"tfds": _BOTH, "hub": _BOTH},
        templates=("a photo of a {}, a flower.", "a {} in bloom."),
    ),
    DataSet(
        "oxford-iiit-pet",
        37,
        "www.robots.ox.ac.uk/~vgg/data/pets",
        "CC BY-SA 4.0",
        num_test=3_669,
        tfds="oxford_iiit_pet",
        hub="timm/oxford-iiit-pet",
        templates=("a photo of a {}, a pet.", "a photo of a {}."),
    ),
    DataSet(
        "pcam",
        2,
        "github.com/basveeling/pcam",
        "CC0 1.0",
        num_test=32_768,
        tfds="patch_camelyon",
        hub="1aurent/PatchCamelyon",
        readable={
            "0": "lymph node without a tumour",
            "1": "lymph node with a tumour",
            "False": "lymph node without a tumour",
            "True": "lymph node with a tumour",
        },
        templates=("a microscope image of a {}.", "a stained section of a {}."),
    ),
    DataSet(
        "fer2013",
        7,
        "www.kaggle.com/datasets/msambare/fer2013",
        "none found; copies on the hub state Apache-2.0 and MIT, mteb: not specified",
        num_test=7_178,
        readable={
            "angry": "angry",
            "disgust": "disgusted",
            "fear": "afraid",
            "happy": "happy",
            "neutral": "neutral",
            "sad": "sad",
            "surprise": "surprised",
        },
        templates=("a photo of a face that looks {}.", "a person who is {}."),
    ),
    DataSet(
        "emnist_letters",
        26,
        "www.nist.gov/itl/products-and-services/emnist-dataset",
        "none found; copies on the hub state MIT and CC BY 4.0",
        num_test=20_800,
        size_note="as the hub has it; 14,800 of tensorflow-datasets",
        tfds="emnist/letters",
        hub="tanganke/emnist_letters",
        readable={
            **{str(i + 1): chr(ord("A") + i) for i in range(26)},
            **{chr(ord("A") + i): chr(ord("A") + i) for i in range(26)},
        },
        templates=("a picture of the handwritten letter {}.", "the letter {}."),
    ),
    DataSet(
        "cifar10",
        10,
        "www.cs.toronto.edu/~kriz/cifar.html",
        "none found; the card on the hub: unknown",
        num_test=10_000,
        tfds="cifar10",
        hub="tanganke/cifar10",
        readable=_numbered(_OF_CIFAR10),
        templates=("a photo of a {}.", "a small, blurred photo of a {}."),
    ),
    DataSet(
        "food101",
        101,
        "data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        "scientific fair use; more is to be agreed with the owners of the pictures",
        num_test=25_250,
        tfds="food101",
        hub="ethz/food101",
        test={"tfds": ("validation",), "hub": ("validation",)},
        templates=("a photo of {}, a dish.", "a plate of {}."),
    ),
    # "fashion_mnist" is the packaged task of retex_jax.data.catalogue, which is split in another way.
    DataSet(
        "fashion-mnist",
        10,
        "github.com/zalandoresearch/fashion-mnist",
        "MIT",
        num_test=10_000,
        tfds="fashion_mnist",
        hub="zalando-datasets/fashion_mnist",
        readable={"T-shirt/top": "T-shirt or top", "T - shirt / top": "T-shirt or top"},
        templates=("a product photo of a {}.", "a {}, without colours."),
    ),
    DataSet(
        "rendered-sst2",
        2,
        "github.com/openai/CLIP/blob/main/data/rendered-sst2.md",
        "none found; mteb states MIT, the licence of the repository of CLIP",
        num_test=1_821,
        hub="nateraw/rendered-sst2",
        readable={"negative": "negative", "positive": "positive", "0": "negative", "1": "positive"},
        templates=("a {} review of a film, as a picture of its text.",),
        archives=archives.RENDERED_SST2,
    ),
    DataSet(
        "kmnist",
        10,
        "github.com/rois-codh/kmnist",
        "CC BY-SA 4.0",
        num_test=10_000,
        tfds="kmnist",
        hub="tanganke/kmnist",
        templates=_LETTER,
    ),
    DataSet(
        "vegetables",
        15,
        "www.kaggle.com/datasets/misrakahmed/vegetable-image-dataset",
        "none found",
        num_test=3_000,
        templates=("a photo of a {}, a vegetable.", "a {} on the market."),
    ),
    DataSet(
        "kvasir-v2",
        8,
        "datasets.simula.no/kvasir",
        "research and education",
        num_test=1_600,
        size_note="a fifth of 8,000",
        templates=("an endoscopic image of {}.", "{} seen in the digestive tract."),
    ),
    DataSet(
        "intel-images",
        6,
        "www.kaggle.com/datasets/puneet6060/intel-image-classification",
        "none found",
        num_test=3_000,
    ),
    DataSet(
        "weather",
        11,
        "www.kaggle.com/datasets/jehanbhathena/weather-dataset",
        "none found; others state CC0 1.0 of it",
        num_test=1_372,
        size_note="a fifth of 6,862",
        readable={"fogsmog": "fog or smog"},
        templates=("a photo of {}.", "weather with {}."),
    ),
    DataSet(
        "cats-dogs",
        2,
        "www.kaggle.com/c/dogs-vs-cats",
        "none found; the card on the hub: unknown",
        num_test=4_652,
        size_note="a fifth of the 23,262 that tensorflow-datasets keeps of 25,000",
        tfds="cats_vs_dogs",
        test=_ONE,
        readable={"Cat": "cat", "Dog": "dog"},
    ),
    DataSet(
        "mangoleaf",
        8,
        "MangoLeafBD, doi.org/10.17632/hxsnvwty3r",
        "CC BY 4.0",
        num_test=800,
        size_note="a fifth of 4,000",
        readable={"Healthy": "no disease"},
        templates=("a photo of a mango leaf with {}.", "a leaf of a mango tree that has {}."),
    ),
    DataSet(
        "beans",
        3,
        "github.com/AI-Lab-Makerere/ibean",
        "MIT",
        num_test=128,
        tfds="beans",
        hub="AI-Lab-Makerere/beans",
        train={"tfds": _BOTH, "hub": _BOTH},
        readable={"healthy": "no disease"},
        templates=("a photo of a bean leaf with {}.", "a leaf of a bean plant that has {}."),
        archives=archives.BEANS,
    ),
    DataSet(
        "landscape",
        5,
        "www.kaggle.com/datasets/utkarshsaxenadn/landscape-recognition-image-dataset-12k-images",
        "none found",
        num_test=500,
        templates=("a photo of a {}.", "a landscape with a {}."),
    ),
    DataSet(
        "garbage",
        6,
        "www.kaggle.com/datasets/asdasdasasdas/garbage-classification",
        "none found for the copy on Kaggle; its source, github.com/garythung/trashnet: MIT",
        num_test=505,
        size_note="a fifth of 2,527",
        readable={"trash": "other waste"},
        templates=("a photo of {} waste.", "a photo of {} to be thrown away."),
    ),
    DataSet(
        "fruits-360",
        0,
        "www.kaggle.com/datasets/moltean/fruits",
        "CC BY-SA 4.0",
        size_note="grows with each version, as the classes do: 22,688 of 131 in version 2020.05.18",
        templates=("a photo of a {}, a fruit or vegetable.", "a {} before a white background."),
    ),
)

DATA_SETS: dict[str, DataSet] = {entry.name: entry for entry in _ALL}
"""The data sets by name, in the papers' order: the suites of 8, 14, 20 and 30 are its beginnings."""
