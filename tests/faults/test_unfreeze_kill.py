"""A run that unfreezes gradually, killed with SIGKILL where stages begin, ends with the bits of one that was not."""

import os
import signal
import subprocess
import sys

from jaxdl.checkpoint import Store
from tests import test_unfreeze
from tests.faults.evidence import ROOT

CODE = """
import os, signal, sys
import tests.conftest
from pathlib import Path
from tests.test_unfreeze import At, run
run(Path(sys.argv[1]), progress=At(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)), checkpoint_every=7)
"""


def test_a_killed_run_equals_the_straight_one(tmp_path):
    """At 11 before the boundary's checkpoint is written, at 17 while that of 16 may still be."""
    want = test_unfreeze.run(tmp_path / "straight", checkpoint_every=7)
    folder = tmp_path / "killed"
    for at in (11, 17):
        words = [sys.executable, "-c", CODE, str(folder), str(at)]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert max(Store(folder / "checkpoints").steps()) < at
    got = test_unfreeze.run(folder, checkpoint_every=7)
    test_unfreeze.same(got, want)
    assert test_unfreeze.log_of(folder) == test_unfreeze.log_of(tmp_path / "straight")
