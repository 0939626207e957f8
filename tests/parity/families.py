"""What every family of pretrained models has to pass, against the real classes of transformers, in float64.

`check_family` builds the PyTorch model with random weights, saves it as transformers does, and then demands that

- both sides give the same outputs, the same gradient of every leaf and the same weights after three AdamW steps, that
  no gradient is zero unless the family says so, and that the loss falls (`verify_parity`);
- jaxdl's own folder holds the same tensors byte for byte, and transformers loads it with nothing missing, nothing
  unexpected, and the same outputs bit for bit.
"""

import contextlib

import numpy as np
import pytest

from jaxdl.pretrained import load, save, verify_parity
from jaxdl.pretrained.tensors import read_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def check_family(family, model_class, config, path, *, tolerance=1e-7, **overrides):
    """Runs all of the above.

    Args:
      family: a `jaxdl.pretrained.Family`.
      model_class: of transformers.
      config: of transformers.
      path: an empty folder, such as `tmp_path`.
      tolerance: of relative differences; float64 on both sides reaches 1e-10.
      **overrides: fields of our module, such as a scanned layout.

    Returns:
      The report, for more demands.
    """
    with quiet_torch():
        theirs = build(model_class, config)
        theirs.save_pretrained(path / "theirs")
        report = verify_parity(path / "theirs", family=family, tolerance=tolerance, theirs=theirs, **overrides)
        assert report.is_equal, f"\n{report}"
        check_export(family, model_class, path, **overrides)
    return report


@contextlib.contextmanager
def quiet_torch():
    """One thread, as the tests share two cores, and no progress bars."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build(model_class, config, *, seed=0):
    """The PyTorch model with random values everywhere, so that no scale of one and no bias of zero hides a mistake."""
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_scale = p.ndim == 1 and not name.endswith("bias")
            p.copy_(noise.abs() * 0.3 + 0.7 if is_scale else noise * 0.2)
    return model


def check_export(family, model_class, path, **overrides):
    """jaxdl's folder against transformers' own."""
    model, params, _, ledger = load(path / "theirs", family=family, **overrides)
    assert not ledger.fresh
    save(path / "ours", model, params, family=family)
    ours, theirs = read_folder(path / "ours"), read_folder(path / "theirs")
    left_out = {*ledger.ignored, *ledger.dropped}
    assert ours.keys() == theirs.keys() - left_out
    for name, x in ours.items():
        assert (x.dtype, x.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert x.tobytes() == theirs[name].tobytes(), name
    back, info = model_class.from_pretrained(path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    assert {*info["missing_keys"]} <= left_out, info
    _, inputs = family.inputs(np.random.default_rng(1), model)
    inputs = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}
    before = model_class.from_pretrained(path / "theirs", attn_implementation="eager")
    with torch.no_grad():
        a, b = (family.their_outputs(side.eval()(**inputs), inputs) for side in (back, before))
    for name, value in a.items():
        assert torch.equal(value, b[name]), f"{name} of the exported folder differs"
