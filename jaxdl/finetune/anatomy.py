"""The parts of a parameter tree, known by the names of their modules: inputs, layers, what comes after, the head.

    layers   layer_<i>, block_<i>, stage_<i>/block_<j>, stage_<i>, or dense_<i> with norm_<i>, anywhere in the path
    inputs   embed, stem, stem_<...>, relative, and every leaf called `embedding`
    head     head; in CLIP the projections, logit_scale and logit_bias

What is neither layer nor input (pooler, final norm, head) comes after the layers. Layers lie in *stacks*: T5 has
`encoder` and `decoder`, CLIP one in each tower.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.paths import Tree

ADAPTERS = "adapters"
_LAYER = r"(?P<stack>(?:[^/]+/)*?)(?P<kind>layer|block|stage|dense|norm)_(?P<i>\d+)(?:/block_(?P<j>\d+))?/.*"
_INPUT = r"(?P<above>(?:[^/]+/)*?)(?P<name>embed|relative|stem(?:_[^/]+)?)/.*"
_TABLE = r"(?P<above>)(?P<name>(?:[^/]+/)*embedding)"
_SCANNED = r"(?P<stack>(?:[^/]+/)*?)layers/.*"
_HEADS = (r"head/.*", r"(text|vision)_projection/.*", r"logit_(scale|bias)")
_TIED = r"(?:.*/)?embed/token/embedding"
_KINDS = ({"layer"}, {"block"}, {"stage"}, {"dense"}, {"dense", "norm"})


class Anatomy(NamedTuple):
    """The parts of a tree, as regexes.

    Attributes:
      stacks: the layers of each stack, input first. The first layer of a stage of blocks is a regex that also matches
        the later ones, so rules must name the later ones before it.
      inputs: what comes before the layers, with the prefix of the stacks that it feeds.
      outputs: what comes after the layers.
    """

    stacks: dict[str, list[str]]
    inputs: dict[str, str]
    outputs: list[str]


def dissect(params: Tree, what: str) -> Anatomy:
    """Finds the parts of a tree.

    Args:
      params: the parameters; only their paths are read.
      what: who asks, for the error message.

    Raises:
      JaxdlError: no numbered layers, layers in one array (the scanned layout), or names whose order is not known.

    Example:
      >>> dissect({"embed": {"embedding": 1}, "decoder": {"layer_0": {"kernel": 1}, "norm": {"scale": 1}}}, "example")
      Anatomy(stacks={'decoder/': ['decoder/layer_0/.*']}, inputs={'embed/.*': ''}, outputs=['decoder/norm/.*'])
    """
    base = base_of(params)
    found: dict[str, dict[tuple[int, int], set[str]]] = {}
    claimed = paths.claim([*_HEADS, _LAYER], base)[0]  # a head may have numbered layers of its own
    layered = {path: hit for path, (i, hit) in claimed.items() if i == len(_HEADS)}
    for hit in layered.values():
        at = (int(hit["i"]), int(hit["j"] or 0))
        found.setdefault(hit["stack"], {}).setdefault(at, set()).add(hit["kind"])
    _check_layers(found, base, what)
    stacks = {stack: [_pattern(stack, at, kinds) for at, kinds in sorted(of.items())] for stack, of in found.items()}
    rest = [path for path in base if path not in layered]
    inputs: dict[str, str] = {}
    outputs: dict[str, None] = {}
    entering = paths.claim([_INPUT, _TABLE], rest)[0]
    for path in rest:
        if path in entering:
            i, hit = entering[path]
            feeds = any(stack.startswith(hit["above"]) for stack in stacks)
            inputs[hit["above"] + hit["name"] + ("/.*" if i == 0 else "")] = hit["above"] if feeds else ""
        else:
            outputs[_module(path, stacks)] = None
    return Anatomy(stacks, inputs, list(outputs))


def _check_layers(found: Mapping[str, Mapping[Any, set[str]]], base: Iterable[str], what: str) -> None:
    scanned = [hit["stack"] + "layers" for _, hit in paths.claim([_SCANNED], base)[0].values()]
    if scanned:
        raise JaxdlError(
            f"{what}: {scanned[0]} holds all layers in one array (the scanned layout), so no path tells them apart; "
            "make the model with layout='unrolled' (`unstack_layers` turns its parameters)."
        )
    if not found:
        raise JaxdlError(
            f"{what}: there are no numbered layers (layer_<i>, block_<i>, stage_<i>, dense_<i>); write rules over your "
            f"own paths. {names_of(base)}"
        )
    for stack, layers in found.items():
        kinds = set().union(*layers.values())
        if kinds not in _KINDS:
            names = ", ".join(f"{kind}_<i>" for kind in sorted(kinds))
            raise JaxdlError(f"{what}: {stack or 'the model'} numbers {names}; their order is not known. Write rules.")


def _pattern(stack: str, at: tuple[int, int], kinds: set[str]) -> str:
    i, j = at
    name = "|".join(sorted(kinds))
    name = f"({name})_{i}" if len(kinds) > 1 else f"{name}_{i}"
    return f"{stack}{name}/block_{j}/.*" if j else f"{stack}{name}/.*"


def _module(path: str, stacks: Iterable[str]) -> str:
    """The regex of the largest module around a leaf that holds no stack."""
    names = path.split("/")
    for n in range(1, len(names)):
        above = "/".join(names[:n]) + "/"
        if not any(stack.startswith(above) for stack in stacks):
            return above + ".*"
    return path


def base_of(params: Tree) -> dict[str, Any]:
    """The flat tree without adapters.

    Example:
      >>> base_of({"head": {"kernel": 1}, "adapters": {"head": {"a": 2}}})
      {'head/kernel': 1}
    """
    flat = paths.flatten(params)
    return {path: leaf for path, leaf in flat.items() if not path.startswith(f"{ADAPTERS}/")}


def head_of(params: Tree) -> list[str]:
    """The regexes of the head, none where there is none.

    Example:
      >>> head_of({"text": {}, "text_projection": {"kernel": 1}, "logit_scale": 2})
      ['(text|vision)_projection/.*', 'logit_(scale|bias)']
    """
    base = base_of(params)
    return [regex for regex in _HEADS if paths.claim([regex], base)[0]]


def no_head(params: Tree) -> str:
    """Why a tree without `head/...` has none, and what to do.

    Example:
      >>> no_head({"embed": {"token": {"embedding": 1.0}}}).split(";")[0]
      'there is no head/...: the logits of this model are tied to embed/token/embedding, or it has no head'
    """
    tied = list(paths.claim([_TIED], base_of(params))[0])
    if not tied:
        return f"there is no head/...; name yours: [('classifier/.*', True), ('.*', False)]. {names_of(params)}"
    return (
        f"there is no head/...: the logits of this model are tied to {tied[0]}, or it has no head; train that leaf "
        f"with [('{tied[0]}', True), ('.*', False)], or make the model with a head of its own (head='classify', or "
        "is_tied=False)."
    )


def names_of(params: Any) -> str:
    """The first names of the paths of a tree, or of several paths, as a sentence."""
    names = sorted({path.split("/")[0] for path in (params if isinstance(params, dict) else paths.flatten(params))})
    return f"The tree has: {', '.join(names[:8])}."
