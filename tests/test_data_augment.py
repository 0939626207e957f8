"""Augmentation against closed forms: shifts, mirrors, areas, and shares that sum to 1."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxdl.data import (
    ArraySource,
    Pipeline,
    augment,
    color_jitter,
    cutmix,
    cutout,
    mixup,
    rand_augment,
    random_crop,
    random_flip,
    random_rotate,
)
from jaxdl.data.augment import _OPERATIONS
from jaxdl.data.geometry import affine, rotation, shear, translation
from jaxdl.errors import JaxdlError


def rng(seed=0):
    return np.random.default_rng(seed)


def picture(h=6, w=5, c=3, dtype=np.uint8, seed=0):
    values = rng(seed).integers(1, 256, (h, w, c), dtype=np.uint8)
    return values if dtype == np.uint8 else (values / 255).astype(dtype)


def applied(transform, image, seed=0):
    return transform({"image": image, "label": 3}, rng(seed))["image"]


ALL = [random_crop(2), random_flip(), random_rotate(15), cutout(2), color_jitter(0.3, 0.3, 0.3), rand_augment(2, 0.5)]


@pytest.mark.parametrize("transform", ALL)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_shape_dtype_label_and_input_are_kept(transform, dtype):
    image = picture(dtype=dtype)
    before = image.copy()
    for seed in range(20):
        example = transform({"image": image, "label": 3}, rng(seed))
        assert example["label"] == 3
        assert example["image"].shape == image.shape
        assert example["image"].dtype == dtype
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("transform", ALL)
def test_the_rng_decides_everything(transform):
    results = {applied(transform, picture(), seed).tobytes() for seed in range(30)}
    assert len(results) > 1
    np.testing.assert_array_equal(applied(transform, picture(), 4), applied(transform, picture(), 4))


@pytest.mark.parametrize("transform", ALL)
def test_rows_of_one_generator_are_refused_and_one_image_of_many(transform):
    with pytest.raises(JaxdlError, match=r"shape \(2, 6, 5, 3\), with one generator; augmentation takes one image"):
        applied(transform, np.zeros((2, 6, 5, 3), np.uint8))
    with pytest.raises(JaxdlError, match=r"shape \(6, 5, 3\), with a list of 1 generators; .* or rows"):
        transform({"image": picture()}, [rng(0)])
    with pytest.raises(JaxdlError, match="a list of N generators"):
        transform({"image": np.zeros((2, 6, 5, 3), np.uint8)}, [rng(0)])


@pytest.mark.parametrize("transform", [*ALL, rand_augment(3, 0.9), color_jitter(0.9, 0.9, 0.9)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("at_a_time", [1, 3 * 90, 2**15])
def test_rows_are_changed_as_each_is_alone(transform, dtype, at_a_time, monkeypatch):
    images = np.stack([picture(dtype=dtype, seed=seed) for seed in range(40)])
    alone = [applied(transform, image, seed) for seed, image in enumerate(images)]
    before = images.copy()
    monkeypatch.setattr(augment, "_AT_A_TIME", at_a_time)
    rows = transform({"image": images, "label": np.arange(40)}, [rng(seed) for seed in range(40)])
    np.testing.assert_array_equal(rows["image"], np.stack(alone))
    assert rows["image"].dtype == dtype
    np.testing.assert_array_equal(rows["label"], np.arange(40))
    np.testing.assert_array_equal(images, before)


def test_maps_of_their_own_for_rows():
    images = np.stack([picture(seed=seed) for seed in range(5)])
    degrees, x = np.linspace(-40, 40, 5), np.linspace(-2, 2, 5)
    for change in (lambda i: rotation(degrees[i]), lambda i: shear(x=x[i]), lambda i: translation(x=x[i], y=1.0)):
        each = [affine(image, change(i)) for i, image in enumerate(images)]
        np.testing.assert_array_equal(affine(images, change(slice(None))), np.stack(each))
    one_for_all = [affine(image, rotation(20)) for image in images]
    np.testing.assert_array_equal(affine(images, rotation(20)), np.stack(one_for_all))


def test_a_pipeline_changes_rows_at_once_as_it_does_one_by_one():
    """With a transform of one example before, between and behind, and over processes."""
    images = np.stack([picture(dtype=np.float32, seed=seed) for seed in range(12)])
    source = ArraySource({"image": images, "label": np.arange(12)})

    def darker(example, rng):
        return {**example, "image": example["image"] * np.float32(rng.uniform(0.5, 1))}

    def one_by_one(transform):
        return lambda example, rng: transform(example, rng)

    together = (darker, *ALL[:3], darker, *ALL[3:], darker)
    data = Pipeline(source, 6, seed=3, transforms=together)
    each = Pipeline(source, 6, seed=3, transforms=[one_by_one(transform) for transform in together])
    for step in range(4):
        batch = data[step]
        assert (batch["image"] == each[step]["image"]).all()
        blocks = [data.shard(i, 3)[step] for i in range(3)]
        np.testing.assert_array_equal(np.concatenate([block["image"] for block in blocks]), batch["image"])


def test_images_of_many_sizes_are_changed_one_by_one():
    class Sizes:
        def __len__(self):
            return 8

        def __getitem__(self, row):
            return {"image": np.full((4 + row % 3, 5, 1), row, np.float32), "label": row}

    def cut(example, rng):
        return {**example, "image": example["image"][:4]}

    data = Pipeline(Sizes(), 8, shuffle=False, transforms=[random_flip(), random_crop(0), cut])
    assert data[0]["image"].shape == (8, 4, 5, 1)
    assert data[0]["image"][:, 0, 0, 0].tolist() == list(range(8))
    with pytest.raises(JaxdlError, match="image has different shapes in one batch"):
        _ = Pipeline(Sizes(), 8, transforms=[random_flip()])[0]


def test_a_crop_is_a_shift_with_zeros():
    image = picture(4, 4, 1)
    shifts = {}
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            moved = np.zeros((8, 8, 1), np.uint8)
            moved[2 + dy : 6 + dy, 2 + dx : 6 + dx] = image
            shifts[moved[2:6, 2:6].tobytes()] = (dy, dx)
    seen = {shifts[applied(random_crop(2), image, seed).tobytes()] for seed in range(300)}
    assert len(seen) == 25
    np.testing.assert_array_equal(applied(random_crop(0), image), image)


def test_flip_twice_is_the_identity_and_half_are_flipped():
    image = picture()
    flip = random_flip(1.0)
    np.testing.assert_array_equal(applied(flip, image), image[:, ::-1])
    np.testing.assert_array_equal(applied(flip, applied(flip, image)), image)
    np.testing.assert_array_equal(applied(random_flip(0.0), image), image)
    one = rng(1)
    n_flipped = sum((random_flip()({"image": image}, one)["image"] != image).any() for _ in range(1000))
    assert abs(n_flipped - 500) < 5 * np.sqrt(250)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(0, 5), seed=st.integers(0, 1000))
def test_cutout_area_is_exact_and_a_square(size, seed):
    image = picture(6, 5)
    is_cut = (applied(cutout(size), image, seed) == 0).all(-1)
    assert is_cut.sum() == size**2
    assert (is_cut.any(0).sum(), is_cut.any(1).sum()) == (size, size)


def test_cutout_reaches_every_place():
    places = {np.argwhere(applied(cutout(2), picture(4, 4, 1), seed)[..., 0] == 0)[0].tobytes() for seed in range(200)}
    assert len(places) == 9
    with pytest.raises(JaxdlError, match=r"cutout size=6 does not fit an image of \(6, 5\)"):
        applied(cutout(6), picture())


@pytest.mark.parametrize("n_turns", [0, 1, 2, 3, 4])
def test_quarter_turns_are_exact(n_turns):
    image = picture(5, 5, dtype=np.float64)
    np.testing.assert_allclose(affine(image, rotation(90 * n_turns)), np.rot90(image, n_turns), atol=1e-12)


def test_translation_and_shear_by_whole_pixels_are_exact():
    image = picture(5, 5)
    moved = affine(image, translation(x=2, y=-1))
    np.testing.assert_array_equal(moved[:4, 2:], image[1:, :3])
    assert not moved[4].any()
    assert not moved[:, :2].any()
    sheared = affine(image, shear(x=1.0))
    for row in range(5):
        np.testing.assert_array_equal(sheared[row], affine(image, translation(x=row - 2))[row])
    np.testing.assert_array_equal(
        affine(image, shear(y=1.0)), affine(image.transpose(1, 0, 2), shear(x=1.0)).transpose(1, 0, 2)
    )


def test_half_a_pixel_is_the_mean_of_two():
    image = picture(4, 6, dtype=np.float64)
    moved = affine(image, translation(x=0.5))
    np.testing.assert_allclose(moved[:, 1:], (image[:, 1:] + image[:, :-1]) / 2, atol=1e-12)
    np.testing.assert_allclose(moved[:, 0], image[:, 0] / 2, atol=1e-12)


@pytest.mark.parametrize("degrees", [-20, 7, 33])
def test_rotation_agrees_with_pillow_inside(degrees):
    image = np.zeros((41, 41), np.float32)
    image[12:29, 15:26] = rng(0).random((17, 11), np.float32)
    theirs = Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR)
    ours = affine(image[..., None], rotation(degrees))[..., 0]
    np.testing.assert_allclose(ours, np.asarray(theirs), atol=2e-5)


def test_everything_far_outside_is_zero():
    assert not affine(picture(), translation(x=50)).any()
    assert not affine(picture(), translation(y=-7.3)).any()


def test_the_angle_stays_in_its_range():
    image = np.zeros((41, 41, 1), np.float32)
    image[20, 35:] = 1
    angles = []
    for seed in range(60):
        y, x = np.argwhere(applied(random_rotate(30), image, seed)[..., 0] > 0.2).mean(0)
        angles.append(np.degrees(np.arctan2(20 - y, x - 20)))
    assert -31 < min(angles) < -15
    assert 15 < max(angles) < 31


def test_jitter_by_nothing_changes_nothing():
    for dtype in (np.uint8, np.float32):
        np.testing.assert_array_equal(applied(color_jitter(), picture(dtype=dtype)), picture(dtype=dtype))


def test_jitter_closed_forms():
    image = picture(dtype=np.float64) * 0.5 + 0.2
    bright = applied(color_jitter(brightness=0.2), image)
    np.testing.assert_allclose(bright / image, bright.ravel()[0] / image.ravel()[0])
    contrast = applied(color_jitter(contrast=0.2), image)
    assert contrast.mean() == pytest.approx(image.mean())
    ratio = (contrast - image.mean()) / (image - image.mean())
    np.testing.assert_allclose(ratio, ratio.ravel()[0])
    saturated = applied(color_jitter(saturation=0.2), image)
    np.testing.assert_allclose(saturated.mean(-1), image.mean(-1))
    assert np.abs(saturated - image).max() > 0.005
    grey = np.repeat(image[..., :1], 3, axis=-1)
    np.testing.assert_allclose(applied(color_jitter(saturation=0.9), grey), grey)


def test_standardised_images_are_refused_by_colour():
    for transform in (color_jitter(0.1), rand_augment()):
        with pytest.raises(JaxdlError, match=r"standardise after augmenting"):
            applied(transform, picture(dtype=np.float32) * 4 - 2)


@pytest.mark.parametrize("op", range(len(_OPERATIONS)))
def test_operations_of_rand_augment_do_nothing_at_strength_0(op):
    images, signs = picture(dtype=np.float64)[None], np.ones(1)
    np.testing.assert_allclose(_OPERATIONS[op](images, 0.0, signs), images, atol=1e-12)
    changed = np.abs(_OPERATIONS[op](images, 0.6, signs) - images).max() > 0.01
    assert changed == (op != 0)


def test_solarize_and_posterize():
    images, signs = np.array([0.0, 0.3, 0.6, 1.0]).reshape(1, 1, 4, 1), np.ones(1)
    np.testing.assert_allclose(_OPERATIONS[8](images, 0.5, signs).ravel(), [0, 0.3, 0.4, 0])
    levels = _OPERATIONS[9](np.arange(256).reshape(1, 16, 16, 1) / 255, 1.0, signs)
    np.testing.assert_allclose(np.unique(levels), np.arange(16) * 16 / 255)


def test_rand_augment_of_no_operations_is_the_identity():
    np.testing.assert_array_equal(applied(rand_augment(0), picture()), picture())


@pytest.mark.parametrize(
    "make",
    [
        lambda: random_crop(-1),
        lambda: random_flip(1.5),
        lambda: random_rotate(-1),
        lambda: cutout(-1),
        lambda: color_jitter(contrast=1.5),
        lambda: rand_augment(-1),
        lambda: rand_augment(2, 9),
        lambda: mixup(0, 3),
        lambda: cutmix(float("nan"), 3),
    ],
)
def test_arguments_out_of_range(make):
    with pytest.raises(JaxdlError, match=r"must (be|lie)"):
        make()


def coded_batch(n=12, n_classes=12, h=9, w=7):
    """Row i is a constant image of value i with label i, so that a pixel tells where it came from."""
    rows = np.arange(n, dtype=np.int32)
    return {"image": np.broadcast_to(rows[:, None, None, None], (n, h, w, 1)).astype(np.float32), "label": rows}


@settings(max_examples=60, deadline=None)
@given(alpha=st.floats(0.1, 5), seed=st.integers(0, 10_000))
def test_mixup_mixes_pixels_and_labels_with_one_share(alpha, seed):
    out = mixup(alpha, 12)(coded_batch(), rng(seed))
    np.testing.assert_allclose(out["label"].sum(1), 1, rtol=1e-6)
    assert out["label"].min() >= 0
    np.testing.assert_allclose(out["image"][:, 0, 0, 0], out["label"] @ np.arange(12.0), rtol=1e-4, atol=1e-4)
    assert (out["label"].dtype, out["image"].dtype) == (np.float32, np.float32)


@settings(max_examples=60, deadline=None)
@given(alpha=st.floats(0.1, 5), seed=st.integers(0, 10_000))
def test_cutmix_labels_are_the_exact_shares_of_pixels(alpha, seed):
    out = cutmix(alpha, 12)(coded_batch(), rng(seed))
    pixels = out["image"].reshape(12, -1).astype(int)
    shares = np.stack([np.bincount(row, minlength=12) for row in pixels]) / pixels.shape[1]
    np.testing.assert_allclose(out["label"], shares, atol=1e-6)


def test_cutmix_pastes_one_box_and_keeps_the_dtype():
    batch = coded_batch()
    batch["image"] = batch["image"].astype(np.uint8)
    before = batch["image"].copy()
    out = cutmix(1.0, 12)(batch, rng(3))
    is_other = out["image"][..., 0] != np.arange(12)[:, None, None]
    for mask in is_other[is_other.any((1, 2))]:
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum() > 0
    assert out["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["image"], before)


def test_the_share_of_mixup_follows_beta():
    one = rng(0)
    batch = {"image": np.zeros((2, 1, 1, 1)), "label": np.array([0, 1])}
    shares = np.array([mixup(0.5, 2)(batch, one)["label"] for _ in range(4000)])
    mixed = shares[:, 0, 0][(shares[:, 0, 0] != 1)]
    # Var Beta(a, a) = 1 / (4 (2 a + 1)); draws whose permutation is the identity leave the row as it is.
    assert mixed.var() == pytest.approx(1 / 8, rel=0.1)


def test_cutmix_cuts_about_the_drawn_area():
    one, batch = rng(0), coded_batch(2, h=64, w=64)
    shares = np.array([cutmix(1.0, 2)(batch, one)["label"].max(1).mean() for _ in range(1500)])
    assert 0.75 < shares.mean() < 0.95


def test_mixing_twice_keeps_shares():
    batch = mixup(0.4, 12)(cutmix(1.0, 12)(coded_batch(), rng(0)), rng(1))
    np.testing.assert_allclose(batch["label"].sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(batch["image"].mean((1, 2, 3)), batch["label"] @ np.arange(12.0), rtol=1e-4)


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_mixing_refuses_padding_and_wrong_labels(make):
    with pytest.raises(JaxdlError, match="padding rows"):
        make(1.0, 12)({**coded_batch(), "weight": np.r_[np.ones(11), 0]}, rng())
    with pytest.raises(JaxdlError, match=r"label 11 at row 11 is not in 0\.\.10"):
        make(1.0, 11)(coded_batch(), rng())
