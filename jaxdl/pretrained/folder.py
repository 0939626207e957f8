"""A folder of pretrained weights as Hugging Face writes it: config.json, safetensors, tokenizer; in and out."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdl.models.transformer import stack_layers, unstack_layers
from jaxdl.paths import Tree, flatten
from jaxdl.pretrained import hub
from jaxdl.pretrained.family import Family, build_model, family_of, find_architecture, find_family
from jaxdl.pretrained.ledger import Ledger, PretrainedError, shortened
from jaxdl.pretrained.mapping import to_params, to_tensors
from jaxdl.pretrained.registry import FAMILIES
from jaxdl.pretrained.tensors import read_folder, write_atomically, write_folder

CONFIG = "config.json"
TOKENIZERS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))  # any of these sets of files


class Pretrained(NamedTuple):
    """A model with its weights.

    Attributes:
      model: the Linen module.
      params: its parameters, on the default device.
      tokenizer: `jaxdl.data.text.Tokenizer`, or None where the folder has none.
      ledger: what became of every leaf and tensor.
    """

    model: Any
    params: Tree
    tokenizer: Any
    ledger: Ledger


def load(
    source: str | os.PathLike[str],
    *,
    head: str | None = None,
    architecture: str | None = None,
    n_outputs: int | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    fresh: Sequence[str] = (),
    drop: Sequence[str] = (),
    seed: int = 0,
    family: Family | None = None,
    **overrides: Any,
) -> Pretrained:
    """Loads a model, and refuses whatever does not fit and is not named.

    Args:
      source: a folder with config.json and safetensors, which needs no network; or a hub name `org/name`.
      head: another head than the config's, by the family's short name. Its leaves must then be named in `fresh`, and
        the tensors of the old one in `drop`.
      architecture: the same by the class name of transformers.
      n_outputs: of the head.
      dtype: of the computation; None for the dtype of the file.
      param_dtype: of the parameters; None for `dtype`.
      fresh: regexes over leaf paths (of the unrolled layout) that are initialised from `seed` instead of loaded.
      drop: regexes over tensor names that are left out.
      seed: of the fresh leaves.
      family: a `Family` of your own; by default the one that knows the config's `model_type`.
      **overrides: fields of the module, such as `dropout_rate=0.0`.

    Returns:
      `Pretrained(model, params, tokenizer, ledger)`; print the ledger.

    Raises:
      PretrainedError: everything that is wrong, in one message; nothing is loaded in part.
    """
    _check_rules(fresh, drop)
    folder = _find(source)
    config = read_config(folder)
    family = family or find_family(config, FAMILIES)
    chosen = find_architecture(family, config, head=head, architecture=architecture)
    tensors = read_folder(folder)
    dtype = _dtype_of(tensors) if dtype is None else dtype
    overrides |= {"dtype": dtype, "param_dtype": dtype if param_dtype is None else param_dtype}
    overrides |= {} if n_outputs is None else {"n_outputs": n_outputs}
    model = build_model(family, config, chosen, overrides)
    tokenizer = _read_tokenizer(folder, config)
    like = abstract_params(family, model)
    params, ledger = to_params(
        family.entries(model),
        tensors,
        unrolled(like),
        names=family.names,
        fresh=fresh,
        drop=drop,
        source=str(folder),
    )
    params = _on_device(params, _init(family, model, ledger.fresh, seed))
    return Pretrained(model, stack_layers(params) if is_scanned(like) else params, tokenizer, ledger)


def _check_rules(fresh: Any, drop: Any) -> None:
    for what, rules in (("fresh", fresh), ("drop", drop)):
        if isinstance(rules, str) or not all(isinstance(rule, str) for rule in rules):
            raise PretrainedError(f"{what}={rules!r} is no list of regular expressions; give a list of str.")


def _find(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise PretrainedError(f"{path} is a file; give the folder that holds {CONFIG} (unpack an archive first).")
    if hub.is_hub_name(os.fspath(source)):
        return hub.fetch(os.fspath(source))
    raise PretrainedError(
        f"{path} does not exist; give a folder with {CONFIG} and safetensors, or a hub name org/name."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
      PretrainedError: there is none, or it is no JSON object.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise PretrainedError(
            f"{folder / CONFIG} cannot be read: {error.strerror}; it belongs to the weights."
        ) from None
    except ValueError as error:
        raise PretrainedError(f"{folder / CONFIG} is no JSON ({error}); fetch it again.") from None
    if not isinstance(config, dict):
        raise PretrainedError(f"{folder / CONFIG} is no JSON object; fetch it again.")
    return config


def _dtype_of(tensors: Mapping[str, np.ndarray]) -> Any:
    floats = {x.dtype for x in tensors.values() if jax.dtypes.issubdtype(x.dtype, np.floating)}
    return jnp.result_type(*floats) if floats else jnp.float32


def _read_tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    if not any(all((folder / name).exists() for name in names) for names in TOKENIZERS):
        return None
    from jaxdl.data.text.tokenizer import Tokenizer, check_fits

    tokenizer = Tokenizer.load(folder)
    n_embeddings = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if n_embeddings is not None:
        check_fits(tokenizer, n_embeddings)
    return tokenizer


def abstract_params(family: Family, model: nn.Module) -> Tree:
    """The shapes and dtypes of a model's parameters, nothing computed."""
    inputs, _ = family.inputs(np.random.default_rng(0), model)
    return jax.eval_shape(lambda key: model.init(key, **inputs), jax.random.key(0))["params"]


def is_scanned(params: Tree) -> bool:
    """Whether layers are stacked: some leaf lies under a child named `layers`.

    Example:
      >>> is_scanned({"encoder": {"layers": {"w": 1}}}), is_scanned({"encoder": {"layer_0": {"w": 1}}})
      (True, False)
    """
    return any("layers" in path.split("/") for path in flatten(params))


def unrolled(params: Tree) -> Tree:
    """Parameters with `layer_<i>` children, concrete or abstract, whatever layout they came in."""
    if not is_scanned(params):
        return params
    is_abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
    return jax.eval_shape(unstack_layers, params) if is_abstract else unstack_layers(params)


def _init(family: Family, model: nn.Module, paths: Sequence[str], seed: int) -> dict[str, jax.Array]:
    """Initial values of some leaves; the compiler drops the work for all others."""
    if not paths:
        return {}
    inputs, _ = family.inputs(np.random.default_rng(0), model)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten(unrolled(model.init(key, **inputs)["params"]))
        return {path: flat[path] for path in paths}

    values: dict[str, jax.Array] = jax.jit(init)(jax.random.key(seed))
    return values


def _on_device(params: Tree, fresh: Mapping[str, jax.Array]) -> Tree:
    leaves = [fresh.get(path, leaf) for path, leaf in flatten(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), [jnp.array(leaf) for leaf in leaves])


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Tree,
    tokenizer: Any = None,
    *,
    dtype: Any = None,
    family: Family | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `from_pretrained` of transformers loads unchanged; it appears complete or not at all.

    Args:
      path: a folder that does not exist yet, or is empty.
      model: of one of jaxdl's families.
      params: its parameters, adapters merged.
      tokenizer: written beside them where given.
      dtype: to cast to; None keeps that of `params`.
      family: as in `load`.
      max_shard_bytes: of data in one file.

    Raises:
      PretrainedError: no family knows the model, the parameters are not the model's, or the folder is not empty.
    """
    path = Path(path)
    is_found, family = family is None, family or family_of(model, FAMILIES)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise PretrainedError(f"{path} is not empty; give a new folder, so that no file of another model stays in it.")
    params = unrolled(params)
    _check_params(params, unrolled(abstract_params(family, model)))
    config = family.to_config(model)
    family = find_family(config, FAMILIES) if is_found else family  # several may share the module's class
    is_bare = config["architectures"][0] == family.bare
    tensors = to_tensors(family.entries(model), params, names=family.names, bare=is_bare)
    if dtype is not None:
        tensors = {name: x.astype(dtype) for name, x in tensors.items()}
    config |= {"torch_dtype": jnp.dtype(_dtype_of(tensors)).name}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_folder(temporary, tensors, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(temporary)
        write_atomically(temporary / CONFIG, [json.dumps(config, indent=2, sort_keys=True).encode(), b"\n"])
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_params(params: Tree, like: Tree) -> None:
    ours, theirs = ({p: tuple(x.shape) for p, x in flatten(tree).items()} for tree in (params, like))
    problems = [f"{p} is missing; the model has {theirs[p]}." for p in theirs if p not in ours]
    problems += [f"{p} {ours[p]} is no leaf of the model; merge adapters first." for p in ours if p not in theirs]
    both = [p for p in ours if p in theirs and ours[p] != theirs[p]]
    problems += [f"{p} has shape {ours[p]}, but the model says {theirs[p]}." for p in both]
    if problems:
        raise PretrainedError.listing("the parameters are not this model's", shortened(problems, "leaves"))
