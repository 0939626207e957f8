"""The documentation is true: its code runs and prints what it says, its links lead somewhere, its commands parse.

In README.md and docs/*.md,

- every block fenced with ```python runs, the blocks of a page one after the other in one namespace; a block preceded by
  `<!-- skip: reason -->` is reported as skipped;
- a block fenced with ```text that follows is what the code prints (`...` stands for anything); with ```text roughly the
  words must be the same and the decimal numbers near;
- relative links, their anchors, and files of the repository named in backticks exist;
- every `python -m experiments.NAME ...` parses; FOLDER, TRAIN.csv and the like stand for the reader's own paths.
"""

import contextlib
import doctest
import importlib
import io
import re
import shlex
import sys
import types
from pathlib import Path

import jax
import pytest

from jaxdl.config import parse

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- skip: (?P<reason>[^\n]+) -->\n+)?^```python\n(?P<code>.*?)^```$"
    r"(?:\n+^```text(?P<mode>[^\n]*)\n(?P<printed>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
PLACES = ("jaxdl", "experiments", "configs", "docs", "tests", "benchmarks")
PATH_IN_BACKTICKS = re.compile(rf"`((?:{'|'.join(PLACES)})/[\w./-]*|Makefile|pyproject\.toml)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]*)\)")
COMMAND = re.compile(r"python -m (experiments\.\w+)([^\n`]*)")
OWN_FOLDERS, OWN_FILES = (
    ("FOLDER", "TRAIN_FOLDER", "TEST_FOLDER"),
    ("TRAIN.csv", "TEST.csv", "TEXTS.jsonl", "vaderSentiment-3.3.2.tar.gz"),
)


def name(page):
    return page.relative_to(ROOT).as_posix()


def is_near(printed, said):
    """Whether two texts have the same words, and decimal numbers that differ by a quarter or 0.05 at the most."""
    pairs = zip(map(float, NUMBER.findall(printed)), map(float, NUMBER.findall(said)), strict=False)
    same_words = NUMBER.sub("#", printed).split() == NUMBER.sub("#", said).split()
    return same_words and all(abs(a - b) <= max(0.05, abs(b) / 4) for a, b in pairs)


def is_said(printed, said, mode):
    if mode.strip() == "roughly":
        return is_near(printed, said)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(said, printed, options)


def run_blocks(text, module, filename="page"):
    """Runs the blocks of a page; yields (block, what it printed)."""
    for block in BLOCK.finditer(text):
        if block["reason"]:
            continue
        first_line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * first_line + block["code"], filename, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), jax.numpy_rank_promotion("allow"):  # as a reader has it
            exec(code, module.__dict__)
        yield block, printed.getvalue()


def check_prints(text, module, filename="page"):
    for block, printed in run_blocks(text, module, filename):
        if block["printed"] is not None:
            at = f"{filename}, line {1 + text.count(chr(10), 0, block.start('code'))}"
            assert is_said(printed, block["printed"], block["mode"]), f"{at} prints\n{printed}"


@pytest.fixture
def module(monkeypatch):
    """A module for the code of a page; dataclasses and Flax look up the module of a class."""
    made = types.ModuleType("page_of_the_documentation")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.chdir(ROOT)
    return made


def skipped_blocks():
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text()):
            if block["reason"]:
                line = 1 + page.read_text().count("\n", 0, block.start("code"))
                yield pytest.param(page, id=f"{name(page)}:{line}", marks=pytest.mark.skip(reason=block["reason"]))


@pytest.mark.parametrize("page", [*(pytest.param(page, id=name(page)) for page in PAGES), *skipped_blocks()])
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page, module):
    check_prints(page.read_text(), module, name(page))


def anchors(text):
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_ends(text, folder):
    """The relative links, anchors and files in backticks of a page that lead nowhere."""
    prose = FENCED.sub("", text)
    found = [path for path in PATH_IN_BACKTICKS.findall(prose) if not (ROOT / path).exists()]
    for link in LINK.findall(prose):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else None
        if not (target is None or target.exists()) or (anchor and anchor not in anchors(_text_of(target, text))):
            found.append(link)
    return found


def _text_of(target, own_text):
    return own_text if target is None else target.read_text()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_file_names_lead_somewhere(page):
    assert dead_ends(page.read_text(), page.parent) == []


def commands(text):
    return COMMAND.findall(text.replace("\\\n", " "))


def parse_command(experiment, words, folder):
    """Parses a command line of the documentation; nothing is trained."""
    for own in OWN_FOLDERS:
        (folder / own).mkdir(exist_ok=True)
        (folder / own / "config.json").touch()  # as a run folder and a pretrained one have it
    for own in OWN_FILES:
        (folder / own).touch()
    argv = [re.sub(rf"\b({'|'.join(OWN_FOLDERS + OWN_FILES)})$", lambda own: str(folder / own[0]), word)
            for word in shlex.split(words, comments=True)]  # fmt: skip
    config_type = importlib.import_module(experiment).Config
    if "--help" not in argv:
        parse(config_type, argv)
        return
    with pytest.raises(SystemExit) as stopped:
        parse(config_type, argv)
    assert stopped.value.code == 0


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_parse(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for experiment, words in commands(page.read_text()):
        parse_command(experiment, words, tmp_path)


def test_every_page_of_the_documentation_is_in_its_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages - set(LINK.findall(index)) == set()


WRONG = """
```python
x = 1
print("accuracy", 0.5)
```

```text roughly
accuracy 0.9
```

See `jaxdl/nothing.py` and `jaxdl/step.py`, [this](nowhere.md), [that](#no-such-heading) and [there](#a-heading).

## A heading

<!-- skip: needs a network -->
```python
raise SystemExit
```

    python -m experiments.classify_images --config configs/digits_cnn.py \\
        --config.optimizer.learning_rat 1
"""


def test_a_page_that_is_wrong_is_caught(module, tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match=r"line 3 prints\n *accuracy 0\.5"):
        check_prints(WRONG, module)
    assert module.x == 1
    assert dead_ends(WRONG, tmp_path) == ["jaxdl/nothing.py", "nowhere.md", "#no-such-heading"]
    [(experiment, words)] = commands(WRONG)
    with pytest.raises(ValueError, match=r"nearest: --config\.optimizer\.learning_rate"):
        parse_command(experiment, words, tmp_path)


@pytest.mark.parametrize(
    ("printed", "said", "mode", "expected"),
    [
        ("a 1.00\n", "a 1.10\n", " roughly", True),
        ("a 1.00\n", "a 1.40\n", " roughly", False),
        ("a 1.00\n", "b 1.00\n", " roughly", False),
        ("a 1.00 2.00\n", "a 1.00\n", " roughly", False),
        ("a 1.00\n", "a 1.01\n", "", False),
        ("a 1.00 and more\n", "a 1.00 ...\n", "", True),
    ],
)
def test_what_a_block_prints_is_compared(printed, said, mode, expected):
    assert is_said(printed, said, mode) is expected


def source_text():
    """The source of the package and the experiments, with the parts of split strings joined."""
    files = [*(ROOT / "jaxdl").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def table_messages(text):
    """The messages in the first column of a page's tables, cut where something changes."""
    for row in re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", row):
            yield from (part.strip() for part in message.split("…") if len(part.strip()) > 3)


def test_the_messages_on_the_page_of_errors_are_those_of_the_code():
    said, source = list(table_messages((ROOT / "docs" / "errors.md").read_text())), source_text()
    assert len(said) > 40
    assert [part for part in said if part not in source] == []
