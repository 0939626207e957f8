"""Single flipped bytes: the short version of `prove_flips`."""

from pathlib import Path

import pytest

from tests.faults import evidence, prove_flips
from tests.faults.prove_flips import Flip, Outcome


def test_five_flips_are_found_and_the_step_before_is_restored(trained):
    outcomes = prove_flips.prove(trained, 5, seed=1)
    assert len({outcome.flip.name for outcome in outcomes}) == 5
    assert [outcome for outcome in outcomes if not (outcome.is_detected and outcome.is_restored)] == []


def test_without_a_flip_nothing_is_detected(trained, tmp_path):
    """The other direction: the proof does not call every restore a detection."""
    outcome = prove_flips.attempt(trained, None, tmp_path)
    assert not outcome.is_detected
    assert not outcome.is_restored


def test_the_drawn_flips_hit_every_file_and_lie_inside_it(trained):
    folder = trained / "checkpoints" / "20"
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    flips = prove_flips.draw(folder, 60, seed=0)
    assert {flip.name for flip in flips} == set(files)
    assert all(0 <= flip.offset < files[flip.name] for flip in flips)
    assert flips == prove_flips.draw(folder, 60, seed=0)
    assert flips != prove_flips.draw(folder, 60, seed=1)


def test_a_missed_flip_shows_in_the_table():
    missed = [Outcome(Flip("d/0a", 1, 1), True, True), Outcome(Flip("manifest.json", 1, 1), False, True)]
    lines = prove_flips.table(missed).splitlines()
    assert lines[2:4] == ["| array data | 1 | 1 | 1 |", "| manifest.json | 1 | 0 | 1 |"]
    assert lines[-1] == "2 flips: 1 detected, 2 restored from the step before"


def test_the_restored_values_are_compared_leaf_by_leaf(trained):
    """Two steps of one run differ in their hashes, so equality with the step before says something."""
    states = [evidence.state(trained, step).parts["params"] for step in (15, 20)]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][path] != states[1][path] for path in states[0])


@pytest.mark.parametrize(("name", "kind"), [("d/5f", "array data"), ("ocdbt.process_0/manifest.ocdbt", None)])
def test_files_are_grouped_by_what_they_hold(name, kind):
    assert prove_flips.kind(name) == (kind or Path(name).name)
