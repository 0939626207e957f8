"""A family of Hugging Face models: what its config means, which class it is here, and the map of its tensors."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from jaxdl.pretrained.entries import Line
from jaxdl.pretrained.ledger import PretrainedError, near
from jaxdl.pretrained.matching import NO_NAMES, Names

Config = Mapping[str, Any]
Outputs = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]


def our_outputs(out: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `verify_parity` compares by default of a jaxdl model: its one array, or its fields.

    Args:
      out: what the model returned: an array, a dict or a NamedTuple; fields that are None are left out.
      inputs: the keywords of the call.

    Example:
      >>> our_outputs({"logits": 1.0, "cache": None}, {})
      {'logits': 1.0}
    """
    fields = out._asdict() if hasattr(out, "_asdict") else out if isinstance(out, Mapping) else {"logits": out}
    return {name: value for name, value in fields.items() if value is not None}


def their_outputs(out: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `verify_parity` compares by default of a transformers model: `logits`, else `last_hidden_state`.

    Example:
      >>> import types
      >>> their_outputs(types.SimpleNamespace(last_hidden_state=1.0), {})
      {'logits': 1.0}
    """
    logits = getattr(out, "logits", None)
    return {"logits": out.last_hidden_state if logits is None else logits}


@dataclasses.dataclass(frozen=True)
class Family:
    """One file of `jaxdl.pretrained` defines one of these.

    Attributes:
      name: of the family, for messages.
      model_types: values of `model_type` in config.json.
      architectures: `{transformers class: head}`; the head is a short name that `load(head=...)` takes.
      modules: the Linen classes that `to_model` builds; `save` finds the family by them.
      to_model: `(config, **overrides) -> module`. `config["architectures"][0]` is the class to build, one of
        `architectures`. Overrides are `dtype`, `param_dtype`, `n_outputs` and fields of the module; each must be a
        parameter of this function or a field, and `n_outputs=None` is never passed.
      to_config: `module -> config.json`: `model_type`, `architectures` and all that transformers needs, so that
        `to_model(to_config(model))` gives the model again.
      entries: `module -> lines` of the map (`jaxdl.pretrained.entries`), for the unrolled layout.
      inputs: `(rng, module) -> (our keywords, their keywords)`: NumPy inputs of odd sizes with padding and masks, for
        initialising and for `verify_parity`. Ours are the keywords of the module's call, theirs of `forward`.
      names: the backbone's prefix, and older spellings of tensor names.
      bare: the architecture whose tensors have no prefix (`BertModel`).
      our_outputs: `(output, our keywords) -> {name: array}` for `verify_parity`.
      their_outputs: `(output, their keywords) -> {name: tensor}` of the same names and shapes.
      zero_gradients: regexes over leaf paths whose gradient is zero whatever the input: the bias of keys, which adds
        one number to all scores of a query, which softmax does not see.

    Example:
      >>> from jaxdl.models import MLP
      >>> x = np.ones((2, 3), np.float32)
      >>> from jaxdl.pretrained.entries import dense
      >>> toy = Family(
      ...     name="toy",
      ...     model_types=("toy",),
      ...     architectures={"ToyForClassification": "classes"},
      ...     modules=(MLP,),
      ...     to_model=lambda config, **other: MLP(**{"widths": (config["hidden_size"],), "n_outputs": 2, **other}),
      ...     to_config=lambda model: {"model_type": "toy", "architectures": ["ToyForClassification"]},
      ...     entries=lambda model: [*dense("toy.fc", "dense_0"), *dense("classifier", "head")],
      ...     inputs=lambda rng, model: ({"x": x}, {"x": x}),
      ...     names=Names(prefix="toy."),
      ... )
      >>> build_model(toy, {"hidden_size": 4}, "ToyForClassification", {"n_outputs": 5}).n_outputs
      5
    """

    name: str
    model_types: tuple[str, ...]
    architectures: Mapping[str, str]
    modules: tuple[type, ...]
    to_model: Callable[..., nn.Module]
    to_config: Callable[[Any], dict[str, Any]]
    entries: Callable[[Any], Sequence[Line]]
    inputs: Callable[[np.random.Generator, Any], tuple[dict[str, Any], dict[str, Any]]]
    names: Names = NO_NAMES
    bare: str | None = None
    our_outputs: Outputs = our_outputs
    their_outputs: Outputs = their_outputs
    zero_gradients: tuple[str, ...] = ()


def find_family(config: Config, known: Sequence[Family]) -> Family:
    """The family of a config.json, by its `model_type`.

    Raises:
      PretrainedError: none has it; the message lists those that are known.

    Example:
      >>> find_family({"model_type": "brt"}, ())
      Traceback (most recent call last):
      jaxdl.pretrained.ledger.PretrainedError: config.json: model_type='brt' is unknown; known are none; for \
another, give family= a Family of your own.
    """
    of_type = {model_type: family for family in known for model_type in family.model_types}
    given = config.get("model_type")
    if given in of_type:
        return of_type[given]
    raise PretrainedError(
        f"config.json: model_type={given!r} is unknown; known are {', '.join(sorted(of_type)) or 'none'}; for"
        " another, give family= a Family of your own."
    )


def family_of(model: nn.Module, known: Sequence[Family]) -> Family:
    """The family whose modules include the model's class.

    Raises:
      PretrainedError: there is none.
    """
    for family in known:
        if isinstance(model, family.modules):
            return family
    classes = ", ".join(module.__name__ for family in known for module in family.modules) or "none"
    raise PretrainedError(f"{type(model).__name__} belongs to no family of transformers' models; known are {classes}.")


def find_architecture(
    family: Family, config: Config, *, head: str | None = None, architecture: str | None = None
) -> str:
    """The transformers class to build: the one asked for, else the config's own.

    Args:
      family: of the config.
      config: config.json.
      head: a short name of the family's heads.
      architecture: a class name; not together with `head`.

    Raises:
      PretrainedError: unknown names, both given, or a config that names several or none.
    """
    known = ", ".join(f"{name} (head={short!r})" for name, short in family.architectures.items())
    if head is not None and architecture is not None:
        raise PretrainedError(f"head={head!r} and architecture={architecture!r} are both given; give one of them.")
    if head is not None:
        chosen = [name for name, short in family.architectures.items() if short == head]
        if not chosen:
            nearest = near(head, family.architectures.values())
            raise PretrainedError(f"head={head!r} is unknown to {family.name}; nearest: {nearest}. Known are {known}.")
        return chosen[0]
    named = [architecture] if architecture is not None else list(config.get("architectures") or [])
    if len(named) != 1:
        raise PretrainedError(f"config.json names {len(named)} architectures; say which by head=: {known}.")
    if named[0] not in family.architectures:
        nearest = near(named[0], family.architectures)
        raise PretrainedError(
            f"architecture {named[0]!r} is unknown to {family.name}; nearest: {nearest}. Known are {known}."
        )
    return str(named[0])


def build_model(family: Family, config: Config, architecture: str, overrides: Mapping[str, Any]) -> nn.Module:
    """Builds the module of a config with some of its fields changed.

    Raises:
      PretrainedError: an override that the module does not have, or a config that lacks a field.
    """
    config = {**config, "architectures": [architecture]}
    try:
        model = family.to_model(config)
    except KeyError as error:
        raise PretrainedError(f"config.json of a {family.name} model lacks {error.args[0]!r}; add it.") from None
    fields = {field.name for field in dataclasses.fields(model)} - {"parent", "name"}
    parameters = inspect.signature(family.to_model).parameters.values()
    fields |= {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    unknown = [name for name in overrides if name not in fields]
    if unknown:
        raise PretrainedError.listing(
            f"overrides of {type(model).__name__}",
            [f"{name}={overrides[name]!r} is unknown; nearest: {near(name, fields)}." for name in unknown],
        )
    return family.to_model(config, **overrides) if overrides else model
