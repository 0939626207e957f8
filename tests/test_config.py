"""Config files, flags, JSON and resuming, on a sample schema of an experiment."""

import collections.abc
import dataclasses
import enum
import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.config import (
    Change,
    ConfigError,
    Duration,
    check_resume,
    diff,
    from_json,
    leaf_values,
    parse,
    to_json,
)
from jaxdl.config.text import to_words
from jaxdl.errors import JaxdlError


class Split(enum.Enum):
    TRAIN = "train"
    ALL = "train+test"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the rows come from."""

    name: str = "digits"
    """Name of the data set."""
    batch_size: int = 32
    """Rows of a step, over all devices."""
    shuffle: bool = True
    """Whether every epoch has its own order."""
    split: Split = Split.TRAIN
    """Rows to train on."""
    class_weights: collections.abc.Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Weight of each class by its name."""

    def problems(self):
        if self.batch_size < 1:
            yield f"batch_size={self.batch_size} must be at least 1; take 32."


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """A multilayer perceptron."""

    widths: tuple[int, ...] = (64, 64)
    """Units of each hidden layer."""
    dropout: float = 0.0
    """Fraction of the units set to zero."""

    def problems(self):
        return [f"dropout={self.dropout} must be below 1."] if self.dropout >= 1 else []


@dataclasses.dataclass(frozen=True)
class CNNConfig:
    """A convolutional network."""

    n_filters: int = 16
    """Filters of the first layer."""
    dropout: float = 0.0
    """Fraction of the features set to zero."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the parameters move."""

    learning_rate: float = 0.1
    """Peak of the schedule."""
    name: Literal["sgd", "adam"] = "sgd"
    """The rule of the update."""
    weight_decay_rules: tuple[tuple[str, bool], ...] = ((".*", True),)
    """Which leaves decay."""
    betas: tuple[float, float] | None = None
    """Decay of the two moments."""

    def __post_init__(self):
        if self.learning_rate == 13:
            raise ValueError("learning_rate=13 is unlucky; take 12.")


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """A moving average of the parameters."""

    decay: float = 0.99
    """Weight of the past."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long it runs."""

    steps: Duration = Duration("10 epochs")
    """Length of the run."""
    eval_every: Duration | None = None
    """Time between evaluations."""
    label: str | None = None
    """Name in the log."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig = DataConfig()
    model: MLPConfig | CNNConfig = MLPConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    ema: EmaConfig | None = None
    seed: int = 0
    """Start of every random stream."""
    out: pathlib.Path = pathlib.Path("runs/a b")
    """Folder of the run."""

    def problems(self):
        if self.seed == 7 and self.data.batch_size == 7:
            return ["seed=7 and data.batch_size=7 exclude each other; change one."]
        return []


@dataclasses.dataclass(frozen=True)
class Strict:
    """A schema with values that must be given."""

    path: str
    """Where to read."""
    data: DataConfig
    model: MLPConfig | CNNConfig
    optimizer: OptimizerConfig = OptimizerConfig()


def write(folder, name, body):
    """Writes a config file that returns the expression, or holds the body if it has several lines."""
    header = "from test_config import *\nimport test_config\n"
    text = body if "\n" in body else f"def get_config():\n    return {body}\n"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + textwrap.dedent(text))
    return str(path)


def problems_of(config_type, *argv, **options):
    """The lines of the error, without the title."""
    with pytest.raises(ConfigError) as error:
        parse(config_type, list(argv), **options)
    title, *lines = str(error.value).split("\n  - ")
    assert title == f"config: {len(lines)} problem(s)"
    assert isinstance(error.value, JaxdlError)
    return lines


# Values.


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--config.seed=3"], "seed", 3),
        (["--config.seed", "-3"], "seed", -3),
        (["--config.optimizer.learning_rate=3e-4"], "optimizer.learning_rate", 3e-4),
        (["--config.optimizer.learning-rate", "1"], "optimizer.learning_rate", 1.0),
        (["--config.optimizer.name=adam"], "optimizer.name", "adam"),
        (["--config.model.widths", "8", "4"], "model.widths", (8, 4)),
        (["--config.model.widths=8"], "model.widths", (8,)),
        (["--config.model.widths=8,4"], "model.widths", (8, 4)),
        (["--config.model.widths", "8,"], "model.widths", (8,)),
        (["--config.model.widths=(8, 4)"], "model.widths", (8, 4)),
        (["--config.model.widths", "[8,4]"], "model.widths", (8, 4)),
        (["--config.model.widths=()"], "model.widths", ()),
        (["--config.optimizer.betas=0.9,-1"], "optimizer.betas", (0.9, -1.0)),
        (["--config.optimizer.betas", "0.9", "-1"], "optimizer.betas", (0.9, -1.0)),
        (["--config.optimizer.betas=(0.9, 1)"], "optimizer.betas", (0.9, 1.0)),
        (["--config.optimizer.betas=None"], "optimizer.betas", None),
        (
            ["--config.optimizer.weight_decay_rules", "(('.*kernel', True), ('.*', False))"],
            "optimizer.weight_decay_rules",
            ((".*kernel", True), (".*", False)),
        ),
        (["--config.data.shuffle=false"], "data.shuffle", False),
        (["--config.data.shuffle", "true"], "data.shuffle", True),
        (["--config.data.shuffle"], "data.shuffle", True),
        (["--config.data.no-shuffle"], "data.shuffle", False),
        (["--config.data.no_shuffle"], "data.shuffle", False),
        (["--config.data.split=ALL"], "data.split", Split.ALL),
        (["--config.data.class_weights={'a': 2, 'b': 0.5}"], "data.class_weights", {"a": 2.0, "b": 0.5}),
        (["--config.data.name=64"], "data.name", "64"),
        (["--config.data.name="], "data.name", ""),
        (["--config.data.name=--x"], "data.name", "--x"),
        (["--config.data.name=a=b"], "data.name", "a=b"),
        (["--config.loop.steps=500"], "loop.steps", Duration("500 steps")),
        (["--config.loop.steps", "0.5 epochs"], "loop.steps", Duration("0.5 epochs")),
        (["--config.loop.steps", "2", "epochs"], "loop.steps", Duration("2 epochs")),
        (["--config.loop.eval-every=none"], "loop.eval_every", None),
        (["--config.loop.eval_every=100 examples"], "loop.eval_every", Duration("100 examples")),
        (["--config.loop.label=None"], "loop.label", None),
        (["--config.loop.label=x y"], "loop.label", "x y"),
        (["--config.out=/tmp/x"], "out", pathlib.Path("/tmp/x")),
    ],
)
def test_a_flag_sets_its_field_and_nothing_else(argv, path, value):
    parsed = parse(Config, argv)
    before, after = leaf_values(Config()), leaf_values(parsed.config)
    assert after == {**before, path: value}
    assert type(after[path]) is type(value)
    assert parsed.sources == {**dict.fromkeys(before, "default"), path: "command line"}
    assert parsed.file is None


def test_no_flags_give_the_default_itself():
    assert parse(Config, []).config == Config()
    default = Config(seed=5)
    assert parse(Config, [], default=default).config is default


def test_argv_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--config.seed=9"])
    assert parse(Config).config.seed == 9


def test_flags_override_a_given_default():
    parsed = parse(Config, ["--config.seed=1"], default=Config(seed=5, model=CNNConfig(n_filters=3)))
    assert parsed.config == Config(seed=1, model=CNNConfig(n_filters=3))


def test_optional_section_that_is_held_has_flags():
    parsed = parse(Config, ["--config.ema.decay=0.5"], default=Config(ema=EmaConfig()))
    assert parsed.config.ema == EmaConfig(0.5)


# Files.


@pytest.mark.parametrize("spell", [lambda path: [f"--config={path}"], lambda path: ["--config", path]])
def test_file_gives_the_values_and_flags_override_them(tmp_path, spell):
    path = write(tmp_path, "x.py", "Config(seed=5, model=CNNConfig(n_filters=3), data=DataConfig(batch_size=8))")
    parsed = parse(Config, [*spell(path), "--config.model.dropout=0.5", "--config.data.batch-size=9"])
    assert parsed.config == Config(seed=5, model=CNNConfig(3, 0.5), data=DataConfig(batch_size=9))
    assert parsed.file == path
    changed = {name: source for name, source in parsed.sources.items() if source != "default"}
    command_line = {"model.dropout": "command line", "data.batch_size": "command line"}
    assert changed == {"seed": path, "model.n_filters": path, **command_line}
    assert parsed.sources.keys() == leaf_values(parsed.config).keys()


def test_a_variant_that_the_file_chose_is_the_files_even_with_default_values(tmp_path):
    path = write(tmp_path, "x.py", "Config(model=CNNConfig())")
    sources = parse(Config, [f"--config={path}"]).sources
    assert {name for name, source in sources.items() if source == path} == {"model.n_filters", "model.dropout"}
    assert sources["ema"] == "default"


def test_file_is_relative_to_the_working_directory_and_leaves_no_trace(tmp_path, monkeypatch):
    write(tmp_path, "configs/x.py", "Config(seed=5)")
    monkeypatch.chdir(tmp_path)
    assert parse(Config, ["--config=configs/x.py"]).config.seed == 5
    monkeypatch.chdir(tmp_path / "configs")
    assert parse(Config, ["--config", "../configs/x.py"]).config.seed == 5
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["configs", "configs/x.py"]


def test_file_may_define_dataclasses_under_postponed_annotations(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\nimport test_config\n"
        "@dataclasses.dataclass\nclass Local:\n    seed: int = 4\n"
        "def get_config():\n    return test_config.Config(seed=Local().seed)\n"
    )
    assert parse(Config, [f"--config={path}"]).config.seed == 4


def test_missing_file_names_its_neighbours(tmp_path):
    for name in ("fashion_cnn.py", "fashion_mlp.py", "digits.py", "fashion.txt"):
        write(tmp_path, name, "Config()")
    [line] = problems_of(Config, f"--config={tmp_path}/fasion_cnn.py")
    assert line.startswith(f"config file {tmp_path}/fasion_cnn.py: it is not there; nearest files: ")
    assert line.index("fashion_cnn.py") < line.index("fashion_mlp.py") < line.index("digits.py")
    assert "fashion.txt" not in line


def test_missing_folder_empty_folder_and_a_folder_for_a_file(tmp_path):
    assert (
        f"there is no folder {tmp_path}/no; paths are relative"
        in problems_of(Config, f"--config={tmp_path}/no/x.py")[0]
    )
    assert "none, there is no Python file beside it" in problems_of(Config, f"--config={tmp_path}/x.py")[0]
    assert "it is a folder; name a file in it" in problems_of(Config, f"--config={tmp_path}")[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1\n", "it has no get_config(); write `def get_config(): return Config(...)` in it."),
        ("get_config = 3\n", "it has no get_config()"),
        (
            "def get_config():\n    x = 1\n    return x / 0\n",
            "it raises ZeroDivisionError in line 5: division by zero.",
        ),
        ("import nowhere_at_all\n", "it raises ModuleNotFoundError in line 3: No module named 'nowhere_at_all'."),
        ("def get_config(:\n", "it raises SyntaxError in line 3: "),
        ("raise SystemExit('two\\nlines')\n", "it raises SystemExit in line 3: two lines."),
        ("{'seed': 1}", "get_config() returns a builtins.dict; expected test_config.Config."),
        ("None", "get_config() returns a builtins.NoneType; expected test_config.Config."),
        ("Config(seed='a')", "seed='a' has type str; expected int."),
        ("Config(seed=True)", "seed=True has type bool; expected int."),
        (
            "Config(model=EmaConfig())",
            "model=EmaConfig(decay=0.99) has type EmaConfig; expected MLPConfig, or CNNConfig.",
        ),
        (
            "Config(loop=LoopConfig(steps=500))",
            "loop.steps=500 has type int; expected a duration such as '10 epochs' or 500.",
        ),
        ("Config(data=DataConfig(class_weights={1: 1.0}))", "data.class_weights: the key 1 is not a str"),
    ],
)
def test_unusable_file(tmp_path, body, message):
    path = write(tmp_path, "x.py", body)
    [line] = problems_of(Config, f"--config={path}")
    assert line.startswith(f"config file {path}: {message}")


def test_file_that_is_no_text(tmp_path):
    (tmp_path / "x.py").write_bytes(b"\xff\xfe\x00")
    [line] = problems_of(Config, f"--config={tmp_path}/x.py")
    assert "it raises " in line


def test_all_wrong_values_of_a_file_are_listed_and_its_flags_still_checked(tmp_path):
    path = write(tmp_path, "x.py", "Config(seed='a', model=MLPConfig(widths=(1, 'b'), dropout=float('nan')))")
    lines = problems_of(Config, f"--config={path}", "--config.sed=1", "--config.model.n_filters=2", "--config.out")
    assert lines[0] == f"config file {path}: model.widths[1]='b' has type str; expected int."
    assert "model.dropout=nan is not finite" in lines[1]
    assert "seed='a'" in lines[2]
    assert lines[3].startswith("--config.sed: no such field")
    assert lines[4].startswith("--config.out: its value is missing")
    assert len(lines) == 5  # n_filters could be right, as far as one can see without the file


def test_module_run_with_m_has_one_class_for_itself_and_its_config_file(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/train.py").write_text(
        "import dataclasses\nfrom jaxdl.config import parse\n"
        "@dataclasses.dataclass(frozen=True)\nclass Config:\n    seed: int = 0\n"
        "if __name__ == '__main__':\n    print(parse(Config).config)\n"
    )
    (tmp_path / "x.py").write_text("from tasks.train import Config\ndef get_config():\n    return Config(seed=5)\n")
    command = [sys.executable, "-m", "tasks.train", "--config=x.py"]
    root = str(pathlib.Path(__file__).parent.parent)
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("Config(seed=5)\n", "", 0)


# Errors of the flags.


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--config.optimizer.learning_rte=1",
            "--config.optimizer.learning_rte: no such field; nearest: --config.optimizer.learning_rate, ",
        ),
        (
            "--config.learning_rate=1",
            "--config.learning_rate: no such field; nearest: --config.optimizer.learning_rate, ",
        ),
        ("--config.=1", "--config.: no such field; nearest: "),
        ("--resume.alow=seed", "--resume.alow: no such flag; nearest: --resume.allow, "),
        ("--sed=1", "--sed: no such flag; nearest: --config.seed, "),
        ("-config.seed=1", "-config.seed has one dash; write --config.seed, or --flag=-config.seed if it is a value."),
        ("seed=1", "'seed=1' belongs to no flag; a flag starts with '--'."),
        ("--config.seed=abc", "--config.seed='abc': expected int."),
        ("--config.seed=1.5", "--config.seed='1.5': expected int."),
        ("--config.seed=", "--config.seed='': its value is missing; write --config.seed=VALUE, int."),
        ("--config.seed", "--config.seed: its value is missing; write --config.seed=VALUE, int."),
        ("--config.optimizer.learning_rate=x", "--config.optimizer.learning_rate='x': expected float."),
        ("--config.optimizer.learning_rate=inf", "='inf': expected float: it must be finite."),
        ("--config.optimizer.learning_rate=nan", "='nan': expected float: it must be finite."),
        ("--config.optimizer.name=adm", "='adm': expected one of 'sgd', 'adam'."),
        ("--config.optimizer.betas=1,2,3", "='1,2,3': expected tuple (float, float), or None."),
        ("--config.data.shuffle=maybe", "='maybe': expected true or false."),
        ("--config.data.no-shuffle=false", "it takes no value; leave out 'no-' or the value."),
        ("--config.data.no-seed", "--config.data.no-seed: no such field"),
        ("--config.data.split=TEST", "='TEST': expected one of TRAIN, ALL."),
        ("--config.data.class_weights=a", "expected mapping of str to float: write it as a Python literal."),
        ("--config.data.class_weights={'a': 'b'}", "value['a']='b' has type str; expected float."),
        ("--config.data.class_weights={1: 2}", "the key 1 is not a str"),
        ("--config.model.widths=8,x,y", "='8,x,y': expected tuple of int: not so 'x', 'y'."),
        (
            "--config.model.widths=(8, x)",
            "expected tuple of int: it is not a Python literal; put quotes around each text in it.",
        ),
        ("--config.model.widths=(8, 'x')", "value[1]='x' has type str; expected int."),
        (
            "--config.optimizer.weight_decay_rules=((1, True), ('a', 2), ('b',))",
            "value[0][0]=1 has type int; expected str."
            "; value[1][1]=2 has type int; expected true or false.; value[2]=('b',) has 1 values",
        ),
        ("--config.optimizer.weight_decay_rules=.*", "write it as a Python literal."),
        ("--config.loop.steps=10 epoch s", "'10 epoch s' is not a duration; write '500 steps'"),
        ("--config.loop.eval_every=soon", "='soon': expected a duration such as '10 epochs' or 500, or None."),
        (
            "--config.model=CNNConfig",
            "--config.model is a section; set one of its fields: --config.model.widths, --config.model.dropout.",
        ),
        (
            "--config.model.n_filters=3",
            "--config.model.n_filters: config.model holds MLPConfig, which has no field n_filters; choose another",
        ),
        (
            "--config.ema.decay=3",
            "--config.ema.decay: config.ema holds None, which has no field decay; choose another in the config file.",
        ),
        ("--config.ema=3", "--config.ema: config.ema holds None"),
        ("--config", "--config: expected one config file; write --config=configs/NAME.py."),
        ("--config=", "--config='': expected one config file"),
        ("--resume.allow", "--resume.allow has no value; name the fields that may change."),
        ("--resume.allow=sed", "--resume.allow='sed': no such field or section; nearest: seed, "),
    ],
)
def test_a_wrong_flag_is_named_with_rule_and_remedy(word, message):
    [line] = problems_of(Config, word)
    assert message in line
    assert "\n" not in line


def test_words_after_a_flag_that_takes_one():
    assert problems_of(Config, "--config.seed", "1", "2") == [
        "--config.seed='1 2': expected int: it takes one value, not 2."
    ]
    assert problems_of(Config, "--config.seed=1", "2") == ["'2' belongs to no flag; a flag starts with '--'."]
    assert problems_of(Config, "--config", "a.py", "b.py")[0].startswith(
        "--config='a.py b.py': expected one config file"
    )


def test_flags_given_twice_in_any_spelling(tmp_path):
    lines = problems_of(
        Config, "--config.data.shuffle", "--config.data.no-shuffle", "--config.data.batch_size=1",
        "--config.data.batch-size", "1", "--resume.allow=seed", "--resume.allow=out",
    )  # fmt: skip
    assert lines == [
        "--resume.allow is given 2 times; give it once, with several names.",
        "--config.data.shuffle is given 2 times (--config.data.shuffle, --config.data.no-shuffle); give it once.",
        "--config.data.batch_size is given 2 times (--config.data.batch_size='1', --config.data.batch-size='1');"
        " give it once.",
    ]
    path = write(tmp_path, "x.py", "Config()")
    assert problems_of(Config, f"--config={path}", "--config", path)[0].startswith("--config is given 2 times (")


def test_everything_wrong_is_listed_at_once(tmp_path):
    path = write(tmp_path, "x.py", "Config(data=DataConfig(batch_size=-1))")
    lines = problems_of(
        Config, f"--config={path}", "stray", "--config.seed=x", "--config.optimizer.name=adm", "--config.nothing=1",
        "--config.model.dropout=2", "--resume.allow", "lop", "seed",
    )  # fmt: skip
    assert lines[0] == "'stray' belongs to no flag; a flag starts with '--'."
    assert any(line.startswith("--resume.allow='lop': no such field or section; nearest: loop") for line in lines)
    assert "--config.seed='x': expected int." in lines
    assert "--config.optimizer.name='adm': expected one of 'sgd', 'adam'." in lines
    assert any(line.startswith("--config.nothing: no such field") for line in lines)
    assert "config.data: batch_size=-1 must be at least 1; take 32." in lines
    assert "config.model: dropout=2.0 must be below 1." in lines  # the good flag counts, though others are wrong
    assert len(lines) == 7


# Combinations.


def test_problems_of_all_sections_are_collected_with_their_path():
    argv = ["--config.seed=7", "--config.data.batch_size=7", "--config.model.dropout=1"]
    assert problems_of(Config, *argv) == [
        "config: seed=7 and data.batch_size=7 exclude each other; change one.",
        "config.model: dropout=1.0 must be below 1.",
    ]
    assert parse(Config, argv[:1]).config.seed == 7


def test_problems_that_raise_and_problems_inside_tuples():
    @dataclasses.dataclass(frozen=True)
    class Block:
        width: int = 1

        def problems(self):
            if self.width == 0:
                return "width=0 must be positive."
            return [][self.width - 1 :] if self.width < 5 else [1 / (self.width - 5)]

    @dataclasses.dataclass(frozen=True)
    class Net:
        blocks: tuple[Block, ...] = ()

    default = Net((Block(1), Block(0), Block(5)))
    assert problems_of(Net, default=default) == [
        "config.blocks.1: width=0 must be positive.",
        "config.blocks.2: ZeroDivisionError: division by zero",
    ]
    [line] = problems_of(Net, "--config.blocks=x")
    assert "a section cannot be written on the command line; set it in a config file" in line
    assert from_json(Net, to_json(default)) == default


def test_a_constructor_that_refuses_is_a_problem():
    assert problems_of(Config, "--config.optimizer.learning_rate=13") == [
        "config: learning_rate=13 is unlucky; take 12."
    ]


def test_fields_without_default_can_be_given_or_are_named():
    lines = problems_of(Strict, "--config.data.batch_size=4")
    assert lines == [
        "config.path has no value and no default; give --config.path=VALUE (str).",
        "config.model has no value and no default; give it in a config file.",
    ]

    @dataclasses.dataclass(frozen=True)
    class Half:
        path: str
        data: DataConfig

    assert parse(Half, ["--config.path=x", "--config.data.batch_size=4"]).config == Half("x", DataConfig(batch_size=4))
    assert parse(Half, ["--config.path=x"]).sources["data.batch_size"] == "default"


def test_section_without_default_is_built_by_its_constructor():
    @dataclasses.dataclass(frozen=True)
    class Outer:
        optimizer: OptimizerConfig

    assert parse(Outer, []).config == Outer(OptimizerConfig())


def test_defaults_of_the_schema_are_checked_too():
    wrong: Any = None

    @dataclasses.dataclass(frozen=True)
    class Loose:
        seed: int = "x"  # type: ignore[assignment]

    assert problems_of(Loose) == ["seed='x' has type str; expected int."]
    assert problems_of(Loose, default=Loose(wrong)) == ["seed=None has type NoneType; expected int."]


def test_a_schema_with_what_no_configuration_holds_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Bad:
        call: collections.abc.Callable = print
        items: list[int] = dataclasses.field(default_factory=list)
        keys: collections.abc.Mapping[int, str] = dataclasses.field(default_factory=dict)
        fine: tuple[int | None, ...] = ()

    with pytest.raises(ConfigError, match=r"schema Bad: 3 problem\(s\)") as error:
        parse(Bad, [])
    assert "call: Callable is no type of a configuration; use bool, int, float, str, Path" in str(error.value)
    assert "items: list" in str(error.value)
    with pytest.raises(ConfigError, match="is no dataclass"):
        parse(dict, [])


# Help.


def help_of(capsys, config_type, *argv, **options):
    with pytest.raises(SystemExit) as done:
        parse(config_type, [*argv], **options)
    assert done.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_has_every_field_with_type_default_and_meaning(capsys, monkeypatch, word):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(capsys, Config, word, prog="train")
    assert text.startswith("usage: train")
    for path in leaf_values(Config()):
        assert (f"--config.{path} " in text) == (path != "ema")
    for part in (
        "--config.seed int Start of every random stream. (default: 0)",
        "--config.data.shuffle true or false Whether every epoch has its own order. (default: true)",
        "--config.data.split one of TRAIN, ALL Rows to train on. (default: TRAIN)",
        "--config.model.widths tuple of int Units of each hidden layer. (default: 64 64)",
        "--config.optimizer.name one of 'sgd', 'adam' The rule of the update. (default: sgd)",
        """Which leaves decay. (default: '((".*", True),)')""",
        "Length of the run. (default: '10 epochs')",
        "Time between evaluations. (default: None)",
        "--resume.allow tuple of str Fields or sections that may differ",
        "--config=FILE takes the configuration from get_config() of a Python file.",
        "How the parameters move.",
    ):
        assert part in text


def test_help_shows_the_values_and_the_variant_of_the_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    path = write(tmp_path, "x.py", "Config(seed=5, model=CNNConfig(n_filters=3), ema=EmaConfig(0.5))")
    text = help_of(capsys, Config, f"--config={path}", "--help", "--config.nonsense=1")
    assert "Start of every random stream. (default: 5)" in text
    assert "Filters of the first layer. (default: 3)" in text
    assert "Weight of the past. (default: 0.5)" in text
    assert "widths" not in text


def test_help_survives_a_broken_file_and_missing_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(capsys, Strict, "--config=nowhere/x.py", "--help")
    assert "there is no folder nowhere" in text
    assert "--config.path str Where to read. (required)" in text
    assert "Units of each hidden layer. (default: 64 64)" in text


def test_importing_and_parsing_without_field_flags_leaves_tyro_alone():
    code = (
        "import sys, dataclasses, jaxdl.config as c\n"
        "@dataclasses.dataclass(frozen=True)\nclass A:\n    seed: int = 0\n"
        "assert 'tyro' not in sys.modules\n"
        "c.parse(A, [])\nassert 'tyro' not in sys.modules\n"
        "c.parse(A, ['--config.seed=1'])\nassert 'tyro' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# JSON.

names = st.text(max_size=5)
finite = st.floats(allow_nan=False, allow_infinity=False)
durations = st.one_of(
    st.integers(0, 10**9).map(Duration), st.decimals(0, 999, places=3).map(lambda d: Duration(f"{d} epochs"))
)
configs = st.builds(
    Config,
    data=st.builds(
        DataConfig,
        name=names,
        batch_size=st.integers(),
        shuffle=st.booleans(),
        split=st.sampled_from(Split),
        class_weights=st.dictionaries(names, finite, max_size=3),
    ),
    model=st.builds(MLPConfig, widths=st.lists(st.integers(), max_size=3).map(tuple), dropout=finite)
    | st.builds(CNNConfig, n_filters=st.integers(), dropout=finite),
    optimizer=st.builds(
        OptimizerConfig,
        learning_rate=finite.filter(lambda x: x != 13),
        name=st.sampled_from(["sgd", "adam"]),
        weight_decay_rules=st.lists(st.tuples(names, st.booleans()), max_size=3).map(tuple),
        betas=st.none() | st.tuples(finite, finite),
    ),
    loop=st.builds(LoopConfig, steps=durations, eval_every=st.none() | durations, label=st.none() | names),
    ema=st.none() | st.builds(EmaConfig, decay=finite),
    seed=st.integers(),
    out=names.map(pathlib.Path),
)


@settings(deadline=None)
@given(configs)
def test_json_round_trip_is_exact(config):
    text = to_json(config)
    back = from_json(Config, text)
    assert back == config
    # Also the types: 1.0 is not 1, -0.0 is not 0.0, a tuple no list.
    assert [repr(v) for v in leaf_values(back).values() if type(v) is not dict] == [
        repr(v) for v in leaf_values(config).values() if type(v) is not dict
    ]
    assert to_json(back) == text


@settings(deadline=None, max_examples=30)
@given(configs)
def test_defaults_as_help_shows_them_rebuild_the_config(config):
    data = dataclasses.replace(config.data, batch_size=max(config.data.batch_size, 8))
    model = dataclasses.replace(config.model, dropout=min(config.model.dropout, 0.5))
    loop = dataclasses.replace(config.loop, label=None if config.loop.label is None else f"a{config.loop.label}")
    config = dataclasses.replace(config, data=data, model=model, loop=loop)
    argv = []
    for path, value in leaf_values(config).items():
        words = to_words(value)
        if path != "ema":
            argv += [f"--config.{path}={words[0]}"] if len(words) == 1 else [f"--config.{path}", *words]
    blank = Config(model=type(config.model)(), ema=config.ema and EmaConfig())
    assert parse(Config, argv, default=blank).config == config


def test_json_is_sorted_indented_and_tagged():
    data = json.loads(to_json(Config(model=CNNConfig())))
    assert data["model"] == {"type": "CNNConfig", "n_filters": 16, "dropout": 0.0}
    assert data["loop"] == {"steps": "10 epochs", "eval_every": None, "label": None}
    assert data["optimizer"]["weight_decay_rules"] == [[".*", True]]
    assert data["data"]["split"] == "TRAIN"
    assert "type" not in data["data"]
    assert to_json(Config(model=CNNConfig())) == json.dumps(data, sort_keys=True, indent=2) + "\n"


def test_json_takes_defaults_for_what_is_left_out_but_not_without_them():
    assert from_json(Config, '{"seed": 3, "model": {"type": "CNNConfig"}}') == Config(seed=3, model=CNNConfig())
    with pytest.raises(ConfigError) as error:
        from_json(Strict, "{}")
    for name in ("path", "data", "model"):
        assert f"{name} has no value and no default; expected " in str(error.value)


def test_json_lists_every_problem():
    text = json.dumps(
        {
            "sed": 1,
            "seed": 1.5,
            "model": {"type": "CNN"},
            "data": {"batch_size": True, "class_weights": {"a": "x"}, "split": "TEST", "nme": "a"},
            "optimizer": {"betas": [1.0], "name": "adm", "weight_decay_rules": [["a", 1]], "learning_rate": "0.1"},
            "loop": {"steps": "10 epoch s", "eval_every": True, "label": 3},
            "ema": {"decay": None},
            "out": 1,
        }
    )
    with pytest.raises(ConfigError) as error:
        from_json(Config, text)
    title, *lines = str(error.value).split("\n  - ")
    assert sorted(lines) == sorted(
        [
            "sed: no such field; nearest: seed, ema, data.",
            "seed=1.5 has type float; expected int.",
            "model.type='CNN' chooses no variant; expected one of ['MLPConfig', 'CNNConfig'].",
            "data.nme: no such field; nearest: name, shuffle, batch_size.",
            "data.batch_size=True has type bool; expected int.",
            "data.class_weights['a']='x' has type str; expected float.",
            "data.split='TEST' has type str; expected one of TRAIN, ALL.",
            "optimizer.betas=[1.0] has 1 values; expected tuple (float, float).",
            "optimizer.name='adm' has type str; expected one of 'sgd', 'adam'.",
            "optimizer.weight_decay_rules[0][1]=1 has type int; expected true or false.",
            "optimizer.learning_rate='0.1' has type str; expected float.",
            "loop.steps: '10 epoch s' is not a duration; write '500 steps' (or 500), '0.5 epochs' or '60000 examples'.",
            "loop.eval_every: True is not a duration; write '500 steps' (or 500), '0.5 epochs' or '60000 examples'.",
            "loop.label=3 has type int; expected str, or None.",
            "ema.decay=None has type NoneType; expected float.",
            "out=1 has type int; expected path.",
        ]
    )
    assert title == f"config from JSON: {len(lines)} problem(s)"


@pytest.mark.parametrize("text", ["", "{", "nonsense", '{"seed": 1, "seed": 2}', "[]", "3", "null", "[" * 100_000])
def test_json_that_is_no_configuration(text):
    with pytest.raises(ConfigError, match="config from JSON: 1 problem"):
        from_json(Config, text)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_both_ways(number):
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate=(nan|inf|-inf) is not finite"):
        to_json(Config(optimizer=OptimizerConfig(learning_rate=number)))
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate=(nan|inf|-inf) is not finite"):
        from_json(Config, json.dumps({"optimizer": {"learning_rate": number}}))


def test_values_of_the_wrong_type_are_not_written():
    wrong: Any = ("x", [1])
    with pytest.raises(ConfigError, match=r"2 problem\(s\)") as error:
        to_json(Config(seed=wrong[0], model=MLPConfig(widths=wrong[1])))
    assert "seed='x' has type str; expected int." in str(error.value)
    assert "model.widths=[1] has type list; expected tuple of int." in str(error.value)


def test_a_constructor_that_refuses_is_a_problem_in_json_too():
    with pytest.raises(ConfigError, match=r"optimizer: learning_rate=13 is unlucky; take 12\."):
        from_json(Config, '{"optimizer": {"learning_rate": 13}}')


def test_a_value_that_would_come_back_different_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Ambiguous:
        out: str | pathlib.Path = "x"

    assert from_json(Ambiguous, to_json(Ambiguous())) == Ambiguous()
    with pytest.raises(ConfigError, match=r"it comes back from JSON as .*Ambiguous\(out='x'\)"):
        to_json(Ambiguous(pathlib.Path("x")))


def test_variants_need_different_names_and_no_field_called_type():
    @dataclasses.dataclass(frozen=True)
    class Typed:
        type: str = "a"

    other = dataclasses.make_dataclass("MLPConfig", [("width", int, 1)], frozen=True)
    bad = dataclasses.make_dataclass("Bad", [("a", MLPConfig | other), ("b", MLPConfig | Typed)], frozen=True)
    with pytest.raises(ConfigError) as error:
        from_json(bad, "{}")
    assert "a: two variants are called MLPConfig; give them different names." in str(error.value)
    assert "b: a variant cannot have a field named 'type' (Typed); rename it." in str(error.value)


# Resuming.


def test_diff_names_the_leaves_that_changed_and_a_variant_as_a_whole():
    new = Config(seed=1, optimizer=OptimizerConfig(learning_rate=0.2), model=CNNConfig(), ema=EmaConfig())
    assert diff(Config(), new) == [
        Change("model", MLPConfig(), CNNConfig()),
        Change("optimizer.learning_rate", 0.1, 0.2),
        Change("ema", None, EmaConfig()),
        Change("seed", 0, 1),
    ]
    assert diff(new, new) == []


@given(configs, configs)
@settings(deadline=None, max_examples=50)
def test_diff_is_empty_exactly_for_equal_configs_and_reverses(old, new):
    assert (diff(old, new) == []) == (old == new)
    assert diff(new, old) == [Change(path, b, a) for path, a, b in diff(old, new)]
    assert check_resume(old, new, allow=[change.path for change in diff(old, new)]) == []


def test_resume_refuses_what_is_not_allowed_with_table_and_remedy():
    old = Config()
    new = Config(seed=1, optimizer=OptimizerConfig(learning_rate=0.2, name="adam"))
    with pytest.raises(ConfigError) as error:
        check_resume(old, new, allow=["optimizer.name"])
    assert str(error.value) == (
        "resume: 2 problem(s)\n"
        "  - optimizer.learning_rate: 0.1 -> 0.2\n"
        "  - seed:                    0   -> 1\n"
        "To go on with new values, allow them by name: --resume.allow optimizer.name optimizer.learning_rate seed."
        " To keep the old ones, set the fields back."
    )


def test_the_remedy_works_as_printed():
    new = Config(seed=1, optimizer=OptimizerConfig(learning_rate=0.2))
    with pytest.raises(ConfigError) as error:
        check_resume(Config(), new)
    words = str(error.value).split("name: ")[1].split(". To keep")[0].split()
    assert check_resume(Config(), new, allow=parse(Config, words).allow) == []


def test_a_section_allows_everything_under_it_but_not_its_namesakes():
    new = Config(optimizer=OptimizerConfig(learning_rate=0.2, name="adam"))
    assert check_resume(Config(), new, allow=["optimizer"]) == []
    with pytest.raises(ConfigError, match=r"optimizer\.name"):
        check_resume(Config(), new, allow=["optimizer.learning_rate"])
    with pytest.raises(ConfigError, match="model: "):
        check_resume(Config(), Config(model=CNNConfig()), allow=["model.n_filters"])


def test_allowing_what_did_not_change_is_a_note():
    assert check_resume(Config(), Config(seed=1), allow=["seed", "loop.steps", "model"]) == [
        "resume: loop.steps was allowed to change and did not.",
        "resume: model was allowed to change and did not.",
    ]


def test_allowing_an_unknown_name_is_an_error_even_where_nothing_changed():
    with pytest.raises(ConfigError, match=r"--resume\.allow='optimzer': no such field or section; nearest: optimizer"):
        check_resume(Config(), Config(), allow=["optimzer"])


def test_resuming_with_another_type_is_refused():
    with pytest.raises(ConfigError, match="the saved run has a MLPConfig, this one a CNNConfig; start a new run"):
        check_resume(MLPConfig(), CNNConfig())


@pytest.mark.parametrize(
    "argv",
    [
        ["--resume.allow", "optimizer.learning_rate", "seed"],
        ["--resume.allow=optimizer.learning-rate,seed"],
        ["--config.seed=3", "--resume.allow=('optimizer.learning_rate', 'seed')"],
    ],
)
def test_allow_on_the_command_line(argv):
    assert parse(Config, argv).allow == ("optimizer.learning_rate", "seed")
