"""Batches as a function of (seed, step): shards, threads and restarts change nothing, bit for bit."""

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data import (
    ArraySource,
    ImageFolder,
    Pipeline,
    Subset,
    cutmix,
    eval_batches,
    fit_standardize,
    mixup,
    one_hot,
    prefetch,
    rand_augment,
    random_crop,
    random_flip,
)
from jaxdl.data.order import example_rng
from jaxdl.data.sources import read_rows, stack
from jaxdl.errors import JaxdlError


def images(n=22, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    return ArraySource({"image": image, "label": rng.integers(0, 4, n).astype(np.int32), "row": np.arange(n)})


def rows_only(source):
    """The same rows without `take`: read one by one."""
    return [source[row] for row in range(len(source))]


def augmented(source=None, batch_size=8, **kwargs):
    transforms = (random_crop(2), random_flip(), rand_augment(1, 0.5))
    return Pipeline(source or images(), batch_size, seed=3, transforms=transforms, **kwargs)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def joined(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def test_a_batch_holds_the_rows_of_its_order():
    data = Pipeline(images(), 8, seed=1)
    for step in (0, 2, 17):
        assert data[step]["row"].tolist() == data.rows(step).tolist() == data.order.rows(step).tolist()
        assert_same(data[step], data.source.take(data.rows(step)))


def test_sizes():
    data = Pipeline(images(22), 8)
    assert (data.n_rows, data.batch_size, data.steps_per_epoch) == (22, 8, 2.75)


def test_in_memory_row_by_row_and_grain_sources_give_the_same_batches():
    source = images()
    by_row = Pipeline(rows_only(source), 8, seed=3)
    by_grain = Pipeline(grain.MapDataset.source(rows_only(source)), 8, seed=3)
    for step in range(4):
        assert_same(Pipeline(source, 8, seed=3)[step], by_row[step])
        assert_same(by_row[step], by_grain[step])
        assert_same(augmented()[step], augmented(rows_only(source))[step])


@pytest.mark.parametrize("n_shards", [1, 2, 4])
@pytest.mark.parametrize("batch_transforms", [(), (mixup(0.4, 4),), (cutmix(1.0, 4),)], ids=["none", "mixup", "cutmix"])
def test_shards_joined_are_the_global_batch(n_shards, batch_transforms):
    data = augmented(batch_transforms=batch_transforms)
    for step in (0, 2, 5):
        shards = [data.shard(i, n_shards) for i in range(n_shards)]
        assert_same(data[step], joined([shard[step] for shard in shards]))
        assert np.concatenate([shard.rows(step) for shard in shards]).tolist() == data.rows(step).tolist()
        assert {len(shard[step]["label"]) for shard in shards} == {8 // n_shards}


def test_a_shard_reads_only_its_own_rows():
    read = []

    class Watched(list):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    data = Pipeline(Watched(rows_only(images())), 8).shard(1, 4)
    _ = data[0]
    assert read == data.rows(0).tolist()
    assert len(read) == 2


def test_batched_and_single_transforms_give_what_a_plain_loop_gives():
    """In any order, and for sources of any kind: only the number of calls differs."""
    source, fills = images(), []
    standardize = fit_standardize(source, "image")

    def note(example, rng):
        fills.append(example["image"].shape)
        return {**example, "draw": rng.random()}

    transforms = [random_crop(2), standardize, note, one_hot(4), random_flip()]
    for kind in (source, rows_only(source)):
        data = Pipeline(kind, 8, seed=5, transforms=transforms)
        expected = []
        for row, position in zip(data.order.rows(1), data.order.positions(1), strict=True):
            example, rng = source[row], example_rng(5, position)
            for transform in transforms:
                example = transform(example, rng)
            expected.append(example)
        assert_same(data[1], stack(expected))
    assert set(fills) == {(6, 6, 3)}


def test_images_of_different_sizes_may_be_brought_to_one_by_a_transform():
    source = [{"image": np.full((size, size, 1), size, np.uint8)} for size in (3, 4, 5)]
    crop = Pipeline(source, 3, shuffle=False, transforms=[lambda e, rng: {"image": e["image"][:3, :3]}])
    assert crop[0]["image"].shape == (3, 3, 3, 1)


def test_augmentation_belongs_to_the_position():
    source = ArraySource({"image": np.broadcast_to(np.arange(36, dtype=np.uint8).reshape(1, 6, 6, 1), (4, 6, 6, 1))})
    data = Pipeline(source, 4, shuffle=False, transforms=[random_crop(3)])
    first, again, next_epoch = data[0]["image"], data[0]["image"], data[1]["image"]
    np.testing.assert_array_equal(first, again)
    assert (first != next_epoch).any()
    assert len({image.tobytes() for image in np.concatenate([first, next_epoch])}) > 4
    smaller = Pipeline(source, 2, shuffle=False, transforms=[random_crop(3)])
    np.testing.assert_array_equal(first, np.concatenate([smaller[0]["image"], smaller[1]["image"]]))


def test_another_seed_gives_other_rows_and_other_augmentation():
    one, other = Pipeline(images(), 8, seed=0), Pipeline(images(), 8, seed=1)
    assert one.rows(0).tolist() != other.rows(0).tolist()
    draws = [Pipeline(images(), 8, seed, False, [lambda e, rng: {"x": rng.random()}])[0]["x"] for seed in (0, 1)]
    assert (draws[0] != draws[1]).all()


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 9), n_threads=st.integers(1, 3), n_ahead=st.integers(0, 4))
def test_resuming_anywhere_with_any_threads_goes_on_as_if_never_stopped(start, n_threads, n_ahead):
    data = augmented(batch_size=5)
    resumed = list(prefetch(augmented(batch_size=5), start, 10, n_threads=n_threads, n_ahead=n_ahead))
    assert len(resumed) == 10 - start
    for step, batch in enumerate(resumed, start):
        assert_same(batch, data[step])


def test_a_batch_that_does_not_divide_names_value_rule_and_remedy():
    with pytest.raises(JaxdlError, match=r"batch_size=30 does not divide over 4 processes; use a multiple of 4"):
        Pipeline(images(), 30).shard(0, 4)
    with pytest.raises(JaxdlError, match=r"batch_size=3 .*such as 4\."):
        eval_batches(images(), 3, process_count=4)
    for index, count in ((4, 4), (-1, 2), (0, 0)):
        with pytest.raises(JaxdlError, match=f"process_index={index} of process_count={count}"):
            Pipeline(images(), 8).shard(index, count)


def test_nan_left_unfilled_is_refused():
    source = ArraySource({"features": np.array([[1.0], [np.nan]])}, check_finite=False)
    with pytest.raises(JaxdlError, match="features holds NaN or infinity in row 1"):
        Pipeline(source, 2)
    with pytest.raises(JaxdlError, match="features holds NaN or infinity in row 1"):
        eval_batches(source, 2)
    filled = Pipeline(source, 2, transforms=[lambda e, rng: {"features": np.nan_to_num(e["features"])}])
    assert np.isfinite(filled[0]["features"]).all()


def test_an_empty_source_and_a_negative_step_are_errors():
    with pytest.raises(JaxdlError, match="n_rows=0"):
        Pipeline([], 2)
    with pytest.raises(JaxdlError, match="n_rows=0"):
        eval_batches([], 2)
    with pytest.raises(JaxdlError, match="step=-1"):
        _ = Pipeline(images(), 2)[-1]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 100])
def test_eval_batches_hold_every_row_once_with_weight_1(batch_size):
    source = images(10)
    batches = eval_batches(source, batch_size)
    everything = joined(list(batches))
    is_real = everything.pop("weight") == 1
    assert_same({key: value[is_real] for key, value in everything.items()}, source.arrays)
    assert {batch["image"].shape for batch in batches} == {(batch_size, 6, 6, 3)}
    assert len(batches) == -(-10 // batch_size)
    assert all(batch["weight"].dtype == np.float32 for batch in batches)


def test_eval_batches_are_the_same_again_with_a_random_transform_and_by_shard():
    batches = eval_batches(images(10), 8, transforms=[random_crop(2)])
    for one, again in zip(batches, batches, strict=True):
        assert_same(one, again)
    shards = [
        eval_batches(images(10), 8, transforms=[random_crop(2)], process_index=i, process_count=4) for i in range(4)
    ]
    for i, batch in enumerate(batches):
        assert_same(batch, joined([shard[i] for shard in shards]))
    assert len(list(prefetch(batches, 0, len(batches)))) == 2
    with pytest.raises(IndexError):
        batches[2]


def test_eval_batches_keep_the_weights_of_the_source():
    source = ArraySource({"x": np.arange(3.0), "weight": np.array([0.5, 2.0, 3.0])})
    assert [batch["weight"].tolist() for batch in eval_batches(source, 2)] == [[0.5, 2.0], [3.0, 0.0]]


def test_eval_batches_keep_weights_of_tokens():
    weight = np.array([[1, 0], [1, 1], [0, 1]], np.float32)
    batches = list(eval_batches(ArraySource({"x": np.arange(3), "weight": weight}), 2))
    assert [batch["weight"].tolist() for batch in batches] == [[[1, 0], [1, 1]], [[0, 1], [0, 0]]]


def test_array_source_lists_every_problem():
    with pytest.raises(JaxdlError, match="differ in length"):
        ArraySource({"a": np.zeros(3), "b": np.zeros(2)})
    with pytest.raises(JaxdlError, match="no rows"):
        ArraySource({"a": np.zeros((0, 2))})
    with pytest.raises(JaxdlError, match="no arrays"):
        ArraySource({})
    with pytest.raises(JaxdlError, match="a has no leading axis"):
        ArraySource({"a": np.float32(1)})
    bad = np.zeros((9, 2))
    bad[[2, 5], [0, 1]] = [np.nan, np.inf]
    with pytest.raises(JaxdlError, match=r"(?s)2 problem.*a holds NaN or infinity in row 2, 5;.*b holds NaN"):
        ArraySource({"a": bad, "b": np.full(9, np.inf), "c": np.zeros(9)})


def test_array_source_selects_maps_and_takes():
    source = images(5)
    assert source.select(np.array([4, 1])).arrays["row"].tolist() == [4, 1]
    assert source.select(source.arrays["row"] > 2).arrays["row"].tolist() == [3, 4]
    assert source.map(lambda a: {"row": a["row"] * 2}).arrays["row"].tolist() == [0, 2, 4, 6, 8]
    assert source.arrays["row"].tolist() == [0, 1, 2, 3, 4]
    taken = source.take(np.array([0]))
    taken["row"][0] = 99
    assert source.arrays["row"][0] == 0
    with pytest.raises(JaxdlError, match="no rows"):
        source.select(np.zeros(5, bool))
    with pytest.raises(JaxdlError, match="NaN"):
        source.map(lambda a: {"row": a["row"] / np.where(a["row"] == 1, np.nan, 1)})


def test_subset_and_stack():
    part = Subset(rows_only(images(5)), [3, 0])
    assert (len(part), part[0]["row"], part[1]["row"]) == (2, 3, 0)
    with pytest.raises(JaxdlError, match="no rows"):
        Subset([{"x": 1}], [])
    assert stack([{"t": b"ab"}, {"t": b"c\0"}])["t"].tolist() == [b"ab", b"c\0"]
    with pytest.raises(JaxdlError, match=r"x has different shapes in one batch: \(2,\), \(3,\)"):
        read_rows([{"x": np.zeros(2)}, {"x": np.zeros(3)}], np.array([0, 1]))
    with pytest.raises(JaxdlError, match=r"differ in their keys: \['x'\] and \['x', 'y'\] \(number 1"):
        stack([{"x": 1}, {"x": 1, "y": 2}])


def test_image_folder_streams_through_a_pipeline(tmp_path):
    from PIL import Image

    for name, grey in (("b", 200), ("a", 10)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((4, 5, 3), grey + i, np.uint8)).save(tmp_path / name / f"{i}.png")
    batch = Pipeline(ImageFolder(tmp_path), 6, shuffle=False)[0]
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["image"][:, 0, 0, 0].tolist() == [10, 11, 12, 200, 201, 202]
