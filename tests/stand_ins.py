"""Small data sets in the layouts of their sources: folders of images, array_record, parquet of the hub."""

import io

import numpy as np
import pytest
from PIL import Image


def pixels(seed, label, height=13, width=17):
    """Noise around a grey of the label's own, uint8 [height, width, 3]."""
    rng = np.random.default_rng([seed, label])
    noise = rng.normal(0, 10, (height, width, 3))
    return np.clip(60 + 70 * label + noise, 0, 255).astype(np.uint8)


def encoded(image, kind="PNG"):
    """The bytes of an image file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def examples(classes, count, seed=0):
    """(file name, label, PNG) of `count` images a class."""
    return [
        (f"{name}_{i}.png", label, encoded(pixels(seed + i, label, 9 + i % 5, 11 + i % 3)))
        for label, name in enumerate(classes)
        for i in range(count)
    ]


def write_folder(folder, classes, count, seed=0):
    """FOLDER/CLASS/IMAGE."""
    for file, label, content in examples(classes, count, seed):
        path = folder / classes[label] / file.replace("/", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_tfds(root, name, classes, counts, configuration=None, first=0):
    """ROOT/NAME[/CONFIGURATION]/1.0.0, written by tensorflow-datasets; labels begin at `first`."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    def info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        label = tfds.features.ClassLabel(names=list(classes))
        features = {"image": image, "label": label, "file_name": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def generate(self, split):
        seed = 1000 * list(counts).index(split)
        for file, label, content in examples(classes[first:], counts[split], seed):
            yield file, {"image": io.BytesIO(content), "label": label + first, "file_name": file}

    members = {
        "VERSION": tfds.core.Version("1.0.0"),
        "name": name,
        "_info": info,
        "_generate_examples": generate,
        "_split_generators": lambda self, _: {
            split: self._generate_examples(split) for split in counts
        },
    }
    if configuration:
        members["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=configuration)]
    with tfds.core.registered.skip_registration():
        builder = type("StandIn", (tfds.core.GeneratorBasedBuilder,), members)
    builder(data_dir=root, file_format="array_record").download_and_prepare()


def write_parquet(folder, classes, counts, configuration="default", image="image", label="label"):
    """FOLDER/CONFIGURATION/SPLIT/0000.parquet, as the hub converts data sets."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {image: datasets.Image(), label: datasets.ClassLabel(names=list(classes))}
    )
    for split, count in counts.items():
        rows = examples(classes, count, 1000 * list(counts).index(split))
        table = datasets.Dataset.from_dict(
            {
                image: [{"bytes": content, "path": None} for _, _, content in rows],
                label: [label for _, label, _ in rows],
            },
            features=features,
        )
        path = folder / configuration / split / "0000.parquet"
        path.parent.mkdir(parents=True)
        table.to_parquet(path)
