"""`kill -9` at random moments: the short version of `prove_kill`."""

import json

import pytest

from tests.faults import evidence, prove_kill
from tests.faults.prove_kill import Kill


@pytest.mark.proof  # test_unfreeze_kill is one, too, and four times as quick
def test_a_kill_changes_no_bit(tmp_path):
    kills, found = prove_kill.prove(tmp_path, 1, seed=5, cache=evidence.ROOT / ".pytest_cache" / "xla-kill")
    assert len(kills) == 1
    assert found
    assert [run for run in found if any(run.values())] == []
    assert set(found[0]) == set(prove_kill.ASPECTS)


@pytest.fixture
def folder(tmp_path, trained):
    """Two folders that hold the same run and the same rows."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run").symlink_to(trained)
        lines = [f"{step}\t{step} {step + 1}\tdigest{step}\n" for step in range(20)]
        (tmp_path / name / "rows.log").write_text("".join(lines))
    return tmp_path


def test_a_run_is_the_same_as_itself(folder):
    assert not any(prove_kill.differences(folder / "one", folder / "two").values())


@pytest.mark.parametrize("line", ["7\t3 4\tother\n", "20\t1 2\tdigest20\n"])
def test_one_batch_more_or_other_rows_show(folder, line):
    with (folder / "two" / "rows.log").open("a") as file:
        file.write(line)
    assert prove_kill.differences(folder / "one", folder / "two")["row order"]


def test_a_step_that_was_given_no_batch_shows(folder):
    for name in ("one", "two"):
        path = folder / name / "rows.log"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert prove_kill.differences(folder / "one", folder / "two")["row order"]


def test_another_last_bit_of_a_metric_shows(folder, run):
    (folder / "two" / "run").unlink()
    (folder / "two" / "run").symlink_to(run)
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["train/loss"] += 2e-16 * rows[1]["train/loss"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prove_kill.differences(folder / "one", folder / "two")["metric log"]


def test_another_state_shows(folder, trained, monkeypatch):
    """Step 15 against step 20 of one run: everything that training changes differs."""
    states = iter([evidence.state(trained, 20), evidence.state(trained, 15)])
    monkeypatch.setattr(evidence, "state", lambda run: next(states))
    found = prove_kill.differences(folder / "one", folder / "two")
    assert found["parameters"]
    assert found["optimizer state"]


def test_the_table_has_a_row_for_each_kill():
    lines = prove_kill.table([Kill(1, 0.5, None, 0, False), Kill(1, 2.25, 10, 14, True)]).splitlines()
    assert lines[2:] == ["| 1 | 1 | 0.50 | 0 |  | none |", "| 2 | 1 | 2.25 | 14 | yes | 10 |"]
