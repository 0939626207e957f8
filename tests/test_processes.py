"""Many real processes over loopback compute what one does, and say what is wrong with them in time."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxdl.checkpoint import Store
from jaxdl.data import ArraySource, Pipeline
from jaxdl.errors import JaxdlError
from jaxdl.parallel import ProcessError, make_mesh, processes, put_batch, watchdog
from jaxdl.parallel.launch import launch
from jaxdl.parallel.roll_call import Place, call_the_roll
from jaxdl.parallel.rows import _block, put_block
from jaxdl.parallel.watchdog import Link
from tests import many_processes, small_networks
from tests.many_processes import losses

ROOT = Path(__file__).parents[1]
CACHED = {
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla-processes"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def launched(n, words, *, cpu_devices=1, timeout=120):
    """`jaxdl launch -n N -- WORDS`: what ended."""
    command = [sys.executable, "-m", "jaxdl", "launch", "-n", str(n), "--cpu-devices", str(cpu_devices), "--", *words]
    environment = {**os.environ, **CACHED}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def program(*words):
    return [sys.executable, "-m", "tests.many_processes", *map(str, words)]


def rows_read(folder):
    """`{process: {step: rows}}`."""
    found = {}
    for path in sorted(folder.glob("rows_*.jsonl")):
        found[int(path.stem.removeprefix("rows_"))] = dict(json.loads(line) for line in path.read_text().splitlines())
    return found


# ---- the same numbers ----

NETWORKS = ("mlp", "gpt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Straight runs of one process with one device."""
    folder = tmp_path_factory.mktemp("alone")
    for name in NETWORKS:
        many_processes.train(name, folder / name, mesh="data=1", steps=20)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes with two devices each."""
    folder = tmp_path_factory.mktemp("two")
    done = launched(2, program(*NETWORKS, "--folder", folder, "--mesh", "data=2,model=2"), cpu_devices=2)
    assert done.returncode == 0, done.stderr
    for name in NETWORKS:
        assert f"[1] {name}: stopped by None at step 20" in done.stdout
    return folder


def assert_same_losses(ours, theirs, steps=range(1, 21)):
    ours, theirs = losses(ours), losses(theirs)
    assert set(ours) == set(theirs) >= set(steps)
    for step in steps:
        assert ours[step].keys() == theirs[step].keys()
        for name in ("train/loss", "all/loss"):
            if name in theirs[step]:
                np.testing.assert_allclose(ours[step][name], theirs[step][name], rtol=1e-5, err_msg=f"{name}, {step}")


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_compute_what_one_does(two, alone, name):
    assert_same_losses(two / name, alone / name)
    assert "all/loss" in losses(two / name)[10]


def test_each_process_reads_its_own_rows_only(two):
    data = Pipeline(ArraySource(small_networks.mlp().data), batch_size=8, seed=many_processes.SEED)
    read = rows_read(two / "mlp")
    assert sorted(read) == [0, 1]
    for step in range(20):
        assert [read[0][step], read[1][step]] == data.rows(step).reshape(2, 4).tolist()


def test_a_run_goes_on_with_any_number_of_processes(tmp_path, alone):
    """Two processes to step 7, one to 12, four to the end: every global batch is that of the straight run."""
    first = launched(2, program("mlp", "--folder", tmp_path, "--mesh", "data=2", "--stop-at", 7))
    assert first.returncode == 0, first.stderr
    assert many_processes.train("mlp", tmp_path / "mlp", mesh="data=2", steps=20, stop_at=12) == 12
    last = launched(4, program("mlp", "--folder", tmp_path, "--mesh", "data=2,model=2"))
    assert last.returncode == 0, last.stderr
    assert_same_losses(tmp_path / "mlp", alone / "mlp")
    read = rows_read(tmp_path / "mlp")
    data = Pipeline(ArraySource(small_networks.mlp().data), batch_size=8, seed=many_processes.SEED)
    assert [read[i][19] for i in range(4)] == [
        *[data.rows(19)[:4].tolist()] * 2,
        *[data.rows(19)[4:].tolist()] * 2,
    ], "processes that share a block of the batch read the same one"


# ---- which rows ----


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([range(0, 2), range(2, 4)], (0, 2)),
        ([range(4, 6), range(6, 8)], (1, 2)),
        ([range(4, 6), range(4, 6)], (2, 4)),
        ([range(0, 2), range(6, 8)], (0, 1)),
        ([range(2, 4), range(4, 6)], (0, 1)),
    ],
)
def test_the_block_of_a_process(held, expected):
    assert _block(held, 8) == expected


@pytest.mark.parametrize("n_leading", [0, 1])
def test_a_block_lies_where_the_whole_batch_would(n_leading):
    mesh = make_mesh(data=4, sequence=2)
    batch = {"x": np.arange(8 * 4).reshape(8, 4)[(None,) * n_leading]}
    ours = put_block(batch, mesh, (0, 1), n_leading=n_leading)["x"]
    theirs = put_batch(batch, mesh, n_leading=n_leading)["x"]
    assert ours.sharding == theirs.sharding
    np.testing.assert_array_equal(ours, theirs)


# ---- signals ----


def started(index, count, port, words, **more):
    """One process of a run, started by hand."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        **CACHED,
        processes.COORDINATOR: f"127.0.0.1:{port}",
        processes.COUNT: str(count),
        processes.INDEX: str(index),
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, **more)


def wait_for(path, text, timeout_s=90.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never held {text}")


@pytest.fixture
def running():
    """Kills what a test leaves behind."""
    found = []
    yield found
    for process in found:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, running):
    port, words = free_port(), program("mlp", "--folder", tmp_path, "--steps", 100_000, "--pause-s", 0.02)
    running += [started(i, 2, port, words) for i in range(2)]
    wait_for(tmp_path / "mlp" / "losses.jsonl", '"step": 6,')
    running[1].send_signal(signal.SIGTERM)
    ended = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    steps = [out.split("stopped by SIGTERM at step ")[1].strip() for out, _ in ended]
    assert steps[0] == steps[1]
    saved = [int(path.name) for path in (tmp_path / "mlp" / "checkpoints").iterdir() if path.name.isdecimal()]
    assert max(saved) == int(steps[0])
    assert int(steps[0]) < 100_000


def until(condition, timeout_s=5.0):
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# ---- the roll call ----


def call_all(places, deadline_s=5.0):
    """The roll call of several processes in threads: what each got or raised."""
    found = [None] * len(places)

    def call(i):
        try:
            found[i] = call_the_roll(places[i], deadline_s)
        except ProcessError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for answer in found:
        for connection in answer[1].values() if isinstance(answer, tuple) else ():
            connection.close()
    return found


def test_all_are_there():
    address = f"127.0.0.1:{free_port()}"
    names = [found[0] for found in call_all([Place(address, 3, i) for i in (2, 0, 1)])]
    assert names[0] == names[1] == names[2]
    assert [name.split()[1] for name in names[0]] == ["0", "1", "2"]


def test_who_did_not_come_is_said_to_all_within_the_deadline():
    address, start = f"127.0.0.1:{free_port()}", time.monotonic()
    found = call_all([Place(address, 4, 0), Place(address, 4, 2)], deadline_s=1.0)
    assert time.monotonic() - start < 3
    for message in found:
        assert message.startswith("of 4 processes 1, 3 did not come within 1 s; here: process 0 (host ")


def test_without_process_0_the_others_say_so_in_time():
    start = time.monotonic()
    [message] = call_all([Place(f"127.0.0.1:{free_port()}", 2, 1)], deadline_s=1.0)
    assert time.monotonic() - start < 3
    assert "process 1 did not find process 0 at 127.0.0.1:" in message
    assert "Connection refused" in message


def test_two_processes_with_one_number():
    address = f"127.0.0.1:{free_port()}"
    found = call_all([Place(address, 3, 0), Place(address, 3, 1), Place(address, 3, 1)])
    assert all("two processes have process_index=1: process 1 (host" in str(message) for message in found)


def test_another_number_of_processes():
    address = f"127.0.0.1:{free_port()}"
    found = call_all([Place(address, 2, 0), Place(address, 3, 1)])
    assert all("was started with process_count=3, process 0 with 2; give all the same." in text for text in found)


@pytest.mark.parametrize("is_shared", [False, True], ids=["plain", "as gRPC listens"])
def test_a_coordinator_address_that_is_taken(is_shared):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(is_shared))
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ProcessError, match=f"cannot listen at the coordinator address {address}: Address already"):
            processes.initialize(address, 2, 0, deadline_s=2.0)


def test_a_stranger_at_the_port_does_no_harm():
    address, found = f"127.0.0.1:{free_port()}", []
    first = threading.Thread(target=lambda: found.extend(call_all([Place(address, 2, 0)])))
    first.start()

    def knock():
        try:
            with socket.create_connection(("127.0.0.1", int(address[10:])), timeout=5) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return stranger.recv(100) == b""
        except ConnectionRefusedError:
            return False
        except ConnectionResetError:  # left with words of ours unread
            return True

    assert until(knock), "it was never answered by being left"
    found += call_all([Place(address, 2, 1)])
    first.join()
    assert all(len(names) == 2 for names, _ in found)


def test_settings_that_make_no_sense(monkeypatch):
    with pytest.raises(ProcessError, match=r"(?s)coordinator='nowhere'.*process_index=4 must lie in 0 \.\. 1"):
        processes.initialize("nowhere", 2, 4)
    with pytest.raises(ProcessError, match="heartbeat_s=0 must be at least 1 second"):
        processes.initialize("127.0.0.1:1", 2, 0, heartbeat_s=0)
    monkeypatch.setenv(processes.COUNT, "2")
    with pytest.raises(ProcessError, match="coordinator is missing"):
        processes.initialize()


def test_one_process_needs_nothing():
    assert not processes.initialize("127.0.0.1:1", 1, 0)
    assert watchdog.current() is None


# ---- what processes tell each other ----


@pytest.fixture
def linked():
    """Links of three processes, all in this one, and what their watchdogs said."""
    pairs = [socket.socketpair() for _ in range(2)]
    names, said = ["process 0", "process 1", "process 2"], [[], [], []]
    make = lambda i, ends: Link(i, names, ends, heartbeat_s=1.0, deadline_s=0.5, on_lost=said[i].append)  # noqa: E731
    links = [make(0, {1: pairs[0][0], 2: pairs[1][0]}), make(1, {0: pairs[0][1]}), make(2, {0: pairs[1][1]})]
    yield links, said, pairs
    for link in links:
        link.close(wait_s=0.0)
    for end in [end for ends in pairs for end in ends]:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    for link in links:
        link._thread.join(5)
    for end in [end for ends in pairs for end in ends]:
        end.close()


def together(*calls):
    """Runs calls in threads; gives what each returned or raised."""
    found = [None] * len(calls)

    def run(i):
        try:
            found[i] = calls[i]()
        except JaxdlError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return found


def test_values_go_round(linked):
    links, _, _ = linked
    for turn in range(3):
        found = together(
            *[lambda link=link, turn=turn: link.exchange("seeds", link.index * 10 + turn) for link in links]
        )
        assert found == [[turn, 10 + turn, 20 + turn]] * 3


def test_who_does_not_come_to_a_meeting_is_named(linked):
    links, _, _ = linked
    links[2].phase = "step 7"
    found = together(lambda: links[0].exchange("the save"), lambda: links[1].exchange("the save"))
    assert all(text.startswith("the save: process 2 (in ") for text in found)
    assert all(text.endswith("did not come in time.") for text in found)


def test_processes_at_different_places_are_named(linked):
    links, _, _ = linked
    found = together(lambda: links[0].exchange("a"), lambda: links[1].exchange("b"))
    assert found[0] == "the processes do not run the same program: process 0 at 'a', process 1 at 'b'."


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_all_stop_at_the_same_poll_however_far_each_is(linked, asking):
    links, _, _ = linked

    def work(link):
        for n in range(1, 10_000):
            if link.poll() is not None:
                return n
            time.sleep(0.001 * (1 + link.index))
            if n == 5 and link.index == asking:
                link.request_stop("SIGTERM")
        return None

    found = together(*[lambda link=link: work(link) for link in links])
    assert found[0] == found[1] == found[2]
    assert found[0] > 5
    assert [link.poll() for link in links] == ["SIGTERM"] * 3


def test_a_stop_that_comes_after_the_last_poll_of_one_holds_nobody(linked):
    links, _, _ = linked
    for _ in range(3):
        links[2].poll()
    links[0].request_stop("SIGINT")
    time.sleep(0.2)
    assert together(*[lambda link=link: [link.poll() for _ in range(3)] for link in links[:2]]) == [[None] * 3] * 2


def test_a_death_is_named_in_all_others_at_once(linked):
    links, said, pairs = linked
    links[2].phase = "step 17"
    time.sleep(0.5)  # a beat tells it
    start = time.monotonic()
    pairs[1][1].shutdown(socket.SHUT_RDWR)
    assert until(lambda: said[0] and said[1])
    assert time.monotonic() - start < 1.0
    for i in (0, 1):
        assert said[i][0].startswith("process 2 is gone: its connection closed. Its last word, ")
        assert " s before, came from step 17. process" in said[i][0]


def test_silence_is_named_after_the_heartbeat(linked, monkeypatch):
    links, said, _ = linked
    monkeypatch.setattr(links[1], "_beat", lambda: None)
    start = time.monotonic()
    assert until(lambda: said[0] and said[2])
    assert 0.5 < time.monotonic() - start < 3.0
    assert "process 1 is gone: it has said nothing for" in said[0][0]


def test_the_error_of_one_reaches_the_others(linked):
    links, said, _ = linked
    links[1].fail("no such file")
    assert until(lambda: said[0] and said[2])
    assert said[2][0].startswith("process 1 failed: no such file")
    assert said[1] == []


def test_goodbyes_are_no_deaths(linked):
    links, said, pairs = linked
    ended = [False] * 3

    def leave(i):
        links[i].close()
        ended[i] = True

    threads = [threading.Thread(target=leave, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    assert until(lambda: ended[1] and ended[2])
    assert not ended[0], "the first process leaves last"
    for _, far in pairs:
        far.close()
    assert until(lambda: ended[0])
    assert said == [[], [], []]


def test_what_the_first_process_raises_all_raise(linked, monkeypatch):
    links, _, _ = linked
    monkeypatch.setattr(watchdog, "_current", links[1])
    monkeypatch.setattr(processes, "is_first", lambda: False)
    others = [lambda link=links[i], text=text: link.exchange("x", text) for i, text in ((0, "full disk"), (2, None))]
    found = together(*others, lambda: processes.led("x", lambda: None, error=JaxdlError))
    assert found[2] == "full disk"


def test_values_that_differ_are_refused_by_process(linked, monkeypatch):
    links, _, _ = linked
    monkeypatch.setattr(watchdog, "_current", links[1])
    name = "the list of checkpoints"
    others = [lambda link=links[i]: link.exchange(name, [5]) for i in (0, 2)]
    found = together(*others, lambda: processes.agree(name, [], "all must see the same folder runs/a."))
    assert found[2] == (
        "the list of checkpoints differs between processes (process 0: [5], process 1: [], process 2: [5]); all must "
        "see the same folder runs/a."
    )


def test_a_save_that_fails_in_the_first_process_fails_in_the_others(linked, monkeypatch, tmp_path):
    links, _, _ = linked
    monkeypatch.setattr(watchdog, "_current", links[1])
    monkeypatch.setattr(processes, "is_first", lambda: False)

    def meet(name, problem, call):
        others = [lambda: links[0].exchange(name, problem), lambda: links[2].exchange(name, None)]
        return together(*others, call)[2]

    state = {"w": np.ones(2)}
    with Store(tmp_path) as store:
        assert meet("the save of step 5", "no space left", lambda: store.save(5, state)) == "no space left"
        assert meet("the save of step 6", None, lambda: store.save(6, state)) is None
        assert meet("the end of the save of step 6", "the disk is gone", store.wait) == "the disk is gone"
    assert list(tmp_path.iterdir()) == [], "only the first process writes"


# ---- the launcher ----


def test_output_comes_behind_the_number_of_its_process(capfd):
    code = "import os, sys; print('out', os.environ['JAXDL_PROCESS_INDEX']); print('err', file=sys.stderr)"
    assert launch([sys.executable, "-c", code], 2) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert sorted(err.splitlines()) == ["[0] err", "[1] err"]


def test_the_first_failure_ends_all(monkeypatch):
    monkeypatch.setattr("jaxdl.parallel.launch.OWN_END_S", 0.2)
    code = "import os, sys, time; time.sleep(0 if os.environ['JAXDL_PROCESS_INDEX'] == '1' else 60); sys.exit(3)"
    start = time.monotonic()
    assert launch([sys.executable, "-c", code], 2) == 3
    assert time.monotonic() - start < 10


def test_who_does_not_listen_to_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr("jaxdl.parallel.launch.OWN_END_S", 0.5)
    monkeypatch.setattr("jaxdl.parallel.launch.KILL_AFTER_S", 0.5)
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.environ['JAXDL_PROCESS_INDEX'] == '0' and (time.sleep(0.3), os.kill(os.getpid(), 9))\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    assert launch([sys.executable, "-c", code], 2) == 128 + signal.SIGKILL
    assert time.monotonic() - start < 10


def test_a_launcher_refuses_what_makes_no_sense():
    with pytest.raises(JaxdlError, match=r"(?s)n_processes=0 must be at least 1.*there is no command"):
        launch([], 0)
    with pytest.raises(JaxdlError, match="cannot start '/no/such/program': No such file"):
        launch(["/no/such/program"], 2)


def test_signals_go_on_to_all(tmp_path):
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
        "time.sleep(60); sys.exit(1)"
    )
    words = [sys.executable, "-m", "jaxdl", "launch", "-n", "2", "--", sys.executable, "-c", code]
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
