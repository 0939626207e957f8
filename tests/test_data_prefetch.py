"""Reading ahead: order, errors, early ends, threads."""

import gc
import itertools
import threading
import time

import jax
import numpy as np
import pytest

from jaxdl.data import ArraySource, Pipeline, prefetch
from jaxdl.errors import JaxdlError


def data():
    return Pipeline(ArraySource({"x": np.arange(1000, dtype=np.float32)}), 10, seed=2)


class Slow:
    """Notes which steps are asked for, by which thread."""

    def __init__(self, seconds=0.0, broken=None, error=None):
        self.seconds, self.broken, self.error = seconds, broken, error
        self.steps, self.threads = [], set()

    def __getitem__(self, step):
        self.steps.append(step)
        self.threads.add(threading.current_thread())
        time.sleep(self.seconds)
        if step == self.broken:
            raise self.error
        return {"step": np.array(step)}


def n_live_after(wait_s=5.0, before=frozenset()):
    end = time.monotonic() + wait_s
    while (alive := set(threading.enumerate()) - set(before)) and time.monotonic() < end:
        time.sleep(0.01)
    return len(alive)


@pytest.mark.parametrize(("n_ahead", "n_threads"), [(0, 1), (1, 1), (2, 1), (5, 3)])
def test_batches_come_in_order(n_ahead, n_threads):
    batches = list(prefetch(data(), 3, 150, n_ahead=n_ahead, n_threads=n_threads))
    assert len(batches) == 147
    for step, batch in enumerate(batches, 3):
        np.testing.assert_array_equal(batch["x"], data()[step]["x"])


def test_put_moves_to_the_device():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    batch = next(prefetch(data(), put=lambda batch: jax.device_put(batch, sharding)))
    assert isinstance(batch["x"], jax.Array)
    assert batch["x"].devices() == {jax.devices()[1]}
    np.testing.assert_array_equal(batch["x"], data()[0]["x"])


def test_work_is_done_ahead_and_in_the_background():
    source = Slow()
    batches = prefetch(source, 0, 100, n_ahead=4)
    next(batches)
    end = time.monotonic() + 5
    while len(source.steps) < 5 and time.monotonic() < end:
        time.sleep(0.005)
    assert sorted(source.steps) == [0, 1, 2, 3, 4]
    assert threading.current_thread() not in source.threads
    batches.close()


def test_no_ahead_reads_in_the_foreground():
    source = Slow()
    batches = prefetch(source, 0, 100, n_ahead=0)
    next(batches)
    assert source.steps == [0]
    assert source.threads == {threading.current_thread()}
    batches.close()


class OddError(Exception):
    pass


@pytest.mark.parametrize("n_ahead", [0, 3])
@pytest.mark.parametrize("error", [OddError("disk"), KeyError("image"), JaxdlError("bad row"), IndexError("3")])
def test_an_error_comes_out_at_its_step_with_its_type(error, n_ahead):
    batches = prefetch(Slow(broken=4, error=error), 2, 9, n_ahead=n_ahead)
    assert [int(next(batches)["step"]) for _ in range(2)] == [2, 3]
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert caught.value is error


@pytest.mark.parametrize("n_ahead", [0, 3])
def test_a_stray_stop_iteration_does_not_end_the_data_silently(n_ahead):
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(prefetch(Slow(broken=4, error=StopIteration()), 2, 9, n_ahead=n_ahead))


def test_an_error_in_put_comes_out_too():
    def put(batch):
        raise OddError("out of memory")

    with pytest.raises(OddError, match="out of memory"):
        next(prefetch(data(), put=put))


@pytest.mark.parametrize("how", ["close", "break", "delete", "exhaust", "error"])
def test_no_thread_and_no_word_is_left(how, capfd):
    before = set(threading.enumerate())
    source = Slow(0.005, broken=7 if how == "error" else None, error=OddError("x"))
    batches = prefetch(source, 0, 20, n_ahead=3, n_threads=2)
    if how == "exhaust":
        assert len(list(batches)) == 20
    elif how == "error":
        with pytest.raises(OddError):
            list(batches)
    else:
        list(itertools.islice(batches, 2))
    if how == "close":
        batches.close()
        assert list(batches) == []
    del batches
    gc.collect()
    assert n_live_after(before=before) == 0
    assert how in ("exhaust", "error") or len(source.steps) < 10
    assert capfd.readouterr() == ("", "")


def test_no_end_and_an_empty_range():
    endless = prefetch(data(), 10**9)
    np.testing.assert_array_equal(next(endless)["x"], data()[10**9]["x"])
    endless.close()
    assert list(prefetch(data(), 5, 5)) == []


def test_numbers_out_of_range():
    for kwargs in ({"start_step": -1}, {"n_ahead": -1}, {"n_threads": 0}):
        with pytest.raises(JaxdlError, match="must be at least 0"):
            prefetch(data(), **kwargs)
    with pytest.raises(JaxdlError, match="stop_step=2 lies before start_step=3"):
        prefetch(data(), 3, 2)
