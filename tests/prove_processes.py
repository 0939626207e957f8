"""Real processes over loopback: five networks as one device computes them, and a run that is killed three times.

    python -m tests.prove_processes [--networks mlp gpt]

First, each network trains for 20 steps over several layouts of 2 and 4 processes; the table says how far losses are
from those of one process with one device, at most 1e-5. Then each trains in exact mode for 40 steps: by one process,
and by 4 processes, 2, 1 and 4 again, of which one dies by `kill -9` each time but the last. The hash of the last state,
and the metric log, must be those of the straight run. The exit code is 1 where something differs.
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests import small_networks
from tests.many_processes import losses
from tests.test_processes import free_port, launched, program, started

STEPS, TOLERANCE = 20, 1e-5
LAYOUTS = {  # mesh, sharding, processes, devices of each
    "2 processes": ("data=2", "replicated", 2, 1),
    "2 processes of 2 devices, FSDP": ("data=4", "fsdp", 2, 2),
    "2 processes of 2 devices, FSDP x tensor": ("data=2,model=2", "fsdp_tensor", 2, 2),
    "4 processes": ("data=4", "replicated", 4, 1),
    "4 processes, FSDP": ("data=4", "fsdp", 4, 1),
    "4 processes, FSDP x tensor": ("data=2,model=2", "fsdp_tensor", 4, 1),
    "4 processes of 2 devices, FSDP x tensor": ("data=4,model=2", "fsdp_tensor", 4, 2),
}
SEQUENCE = {"4 processes, sequence": ("data=2,sequence=2", "fsdp", 4, 1)}
WITH_SEQUENCE = ("lstm", "gpt", "bert_lora")
EXACT_STEPS = 40
CHAIN = ((4, 8), (2, 18), (1, 28), (4, None))  # processes, and the logged step after which one of them is killed
TIMEOUT_S = 1200


def run(networks: Sequence[str], folder: Path, layout: tuple[str, str, int, int], *more: object) -> None:
    mesh, sharding, n, devices = layout
    words = program(*networks, "--folder", folder, "--mesh", mesh, "--sharding", sharding, *more)
    done = launched(n, words, cpu_devices=devices, timeout=TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{layout}: exit code {done.returncode}\n{done.stderr}")


def parity(networks: Sequence[str], folder: Path) -> bool:
    """Prints the table of layouts; whether all is within the tolerance and every loss falls."""
    run(networks, folder / "alone", ("data=1", "replicated", 1, 1), "--steps", STEPS)
    alone = {name: losses(folder / "alone" / name) for name in networks}
    is_good = all(rows[STEPS]["train/loss"] < rows[1]["train/loss"] for rows in alone.values())
    print(f"| layout | {' | '.join(networks)} |\n|---|{'---:|' * len(networks)}", flush=True)
    for title, layout in (LAYOUTS | SEQUENCE).items():
        fitting = [name for name in networks if title in LAYOUTS or name in WITH_SEQUENCE]
        if not fitting:
            continue
        run(fitting, folder / title, layout, "--steps", STEPS)
        far = {name: distance(losses(folder / title / name), alone[name]) for name in fitting}
        is_good &= max(far.values()) <= TOLERANCE
        print(f"| {title} | {' | '.join(f'{far[n]:.0e}' if n in far else '' for n in networks)} |", flush=True)
    return is_good


def distance(ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]]) -> float:
    """The largest relative difference of training losses and of evaluations.

    Example:
      >>> distance({1: {"train/loss": 1.5}}, {1: {"train/loss": 1.0}})
      0.5
    """
    pairs = [
        (ours[step][name], value)
        for step, row in theirs.items()
        for name, value in row.items()
        if name in ("train/loss", "all/loss")
    ]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def straight(name: str, folder: Path) -> str:
    """The hash of one process that is left alone."""
    words = program(name, "--folder", folder, "--mesh", "data=1", "--exact", "--steps", EXACT_STEPS)
    done = launched(1, words, timeout=TIMEOUT_S)
    return re.findall(r"hash (\w+)", done.stdout)[0]


def killed(name: str, folder: Path) -> tuple[str, list[str]]:
    """The hash of a run that different numbers of processes go on with, and what happened on the way."""
    log, story = folder / name / "losses.jsonl", []
    for n, until_step in CHAIN:
        words = program(name, "--folder", folder, "--mesh", f"data={n}", "--sharding", "replicated", "--exact")
        words += ["--steps", str(EXACT_STEPS), "--heartbeat-s", "5"]
        words += [] if until_step is None else ["--pause-s", "0.05"]
        port = free_port()
        processes = [started(i, n, port, words) for i in range(n)]
        if until_step is not None:
            wait_for_row(log, until_step, processes)
            processes[-1].send_signal(signal.SIGKILL)
            at = time.monotonic()
            for process in processes:
                process.wait(timeout=60)
            story.append(f"{n} killed at {max(losses(folder / name))}, all gone {time.monotonic() - at:.1f} s later")
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
        if until_step is None and any(process.returncode for process in processes):
            raise SystemExit(f"{name}, {n} processes: {said}")
    return re.findall(r"hash (\w+)", said[0][0])[0], story


def wait_for_row(log: Path, step: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        if time.monotonic() > end or any(process.poll() is not None for process in processes):
            raise SystemExit(f"step {step} never came: {[process.poll() for process in processes]}")
        time.sleep(0.02)


def chain(networks: Sequence[str], folder: Path) -> bool:
    """Prints the table of killed runs; whether all end as the straight ones."""
    print(
        "\n| network | straight run | killed three times | metric log | on the way |\n|---|---|---|---|---|", flush=True
    )
    is_good = True
    for name in networks:
        reference, (found, story) = straight(name, folder / "straight"), killed(name, folder / "killed")
        logs = [(folder / kind / name / "losses.jsonl").read_text() for kind in ("straight", "killed")]
        is_good &= found == reference and logs[0] == logs[1]
        same = "the same bytes" if logs[0] == logs[1] else "DIFFERS"
        print(f"| {name} | `{reference[:10]}` | `{found[:10]}` | {same} | {'; '.join(story)} |", flush=True)
    return is_good


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=small_networks.NETWORKS, default=list(small_networks.NETWORKS))
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        is_same = parity(given.networks, Path(folder) / "parity")
        is_exact = chain(given.networks, Path(folder) / "exact")
    print(f"\nlosses {'within' if is_same else 'NOT within'} {TOLERANCE:.0e}; ", end="")
    print("every killed run ends with the bits of the straight one" if is_exact else "DIFFERENT BITS")
    return 0 if is_same and is_exact else 1


if __name__ == "__main__":
    sys.exit(main())
