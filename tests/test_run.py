"""The run folder and the parameter table."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.settings import Parallel
from jaxdl import JaxdlError
from jaxdl.config import ConfigError, to_json
from jaxdl.parallel import processes
from jaxdl.paths import RuleError
from jaxdl.run import Run, parameter_rows, replace_text


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    seed: int = 0
    out: str = "runs"


def open_run(folder, config=None, **options):
    return Run(folder, config or Config(), total_steps=10, batch_size=4, is_verbose=False, **options)


def begun(folder, config=None):
    """A run folder with a checkpoint in it."""
    with open_run(folder, config) as run:
        run.store.save(1, {"w": jnp.ones(1)})


def test_a_run_folder_holds_config_and_environment(tmp_path):
    with open_run(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a/b/config.json").read_text() == to_json(Config())
    assert json.loads((tmp_path / "a/b/environment.json").read_text())["jax"] == jax.__version__


def test_a_changed_config_must_be_allowed_by_name(tmp_path):
    begun(tmp_path)
    with pytest.raises(ConfigError, match=r"rate: 0\.1 -> 0\.2"):
        open_run(tmp_path, Config(rate=0.2))
    assert (tmp_path / "config.json").read_text() == to_json(Config())
    with open_run(tmp_path, Config(rate=0.2), allow=["rate"]):
        pass
    assert (tmp_path / "config.json").read_text() == to_json(Config(rate=0.2))


def test_without_a_checkpoint_there_is_nothing_to_protect(tmp_path):
    for rate in (0.1, 0.2):
        with open_run(tmp_path, Config(rate=rate)):
            pass
    assert (tmp_path / "config.json").read_text() == to_json(Config(rate=0.2))


@dataclasses.dataclass(frozen=True)
class Spread(Config):
    parallel: Parallel = dataclasses.field(default_factory=Parallel)


def test_a_run_goes_on_with_other_devices_but_not_in_another_mode(tmp_path):
    begun(tmp_path, Spread())
    with open_run(tmp_path, Spread(parallel=Parallel(mesh="data=4,model=2", sharding="fsdp_tensor", process_count=2))):
        pass
    with pytest.raises(ConfigError, match=r"parallel\.exact: False -> True"):
        open_run(tmp_path, Spread(parallel=Parallel(exact=True)))


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with open_run(tmp_path / "run") as run:
        assert (run.writers, run.progress) == ([], None)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_moved_folder_goes_on(tmp_path):
    begun(tmp_path / "a", Config(out="a"))
    (tmp_path / "a").rename(tmp_path / "b")
    with open_run(tmp_path / "b", Config(out="b")) as run:
        assert run.store.steps() == [1]


def test_a_damaged_config_is_named(tmp_path):
    begun(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(JaxdlError, match=r"config\.json"):
        open_run(tmp_path)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxdlError, match=r"cannot be written: .*; choose another"):
        open_run(tmp_path / "file")


def test_replacing_leaves_no_other_file(tmp_path):
    replace_text(tmp_path / "x", "1")
    replace_text(tmp_path / "x", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "2"


def test_parameter_rows_hold_every_verdict():
    params = {
        "body": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "head": {"kernel": np.ones((3, 1), np.float32)},
    }
    rows = parameter_rows(
        params,
        trainable=[("body/bias", False), (".*", True)],
        lr_scale_rules=[("head/.*", 1.0), (".*", 0.1)],
    )
    assert {row["path"]: (row["trainable"], row["decay"], row["lr_scale"]) for row in rows} == {
        "body/bias": (False, 0.0, 0.0),
        "body/kernel": (True, 1.0, 0.1),
        "head/kernel": (True, 1.0, 1.0),
    }
    assert rows[1]["shape"] == (2, 3)
    with pytest.raises(RuleError, match="nearest paths: head/kernel"):
        parameter_rows(params, trainable=[("haed/.*", True), (".*", False)])


def test_notes_reach_the_progress_line(tmp_path, capsys):
    with Run(tmp_path, Config(), total_steps=10, batch_size=4) as run:
        run.store.save(10, {"w": jnp.ones(1)})
        run.store.wait()
    with Run(tmp_path, Config(), total_steps=10, batch_size=4):
        pass
    assert "is complete; delete it or choose another --config.out" in capsys.readouterr().err
