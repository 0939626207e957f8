"""Rule lists by name: which parameters move (`trainable` rules), and how fast (`lr_scale` rules).

A preset reads the paths of a tree and returns an ordinary rule list, to be printed, changed and given to
`create_state` and `make_train_step` or to `make_optimizer(lr_scale_rules=)`. It refuses a tree in which it would make
no sense. Trees of `jaxdl.models` are known; others are where their parts have the same names (see `anatomy`). The
rules speak of the model; where the tree has adapters, put `("adapters/.*", True)` in front.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdl import paths
from jaxdl.errors import JaxdlError
from jaxdl.finetune.anatomy import ADAPTERS, base_of, dissect, head_of, names_of, no_head
from jaxdl.paths import REST, Rules, Tree
from jaxdl.state import ALL

RuleList = list[tuple[str, Any]]

_BIASES = r"(.*/)?bias"
_NORMS = r"(.*/)?([^/]*_)?(norm|[A-Z]\w*Norm)(_[^/]*)?/(scale|bias)"
_EMBEDDINGS = (r"(.*/)?embed/.*", r"(.*/)?embedding")


def only(*regexes: str) -> RuleList:
    """What the regexes match moves, and everything else is frozen: the short form of configs and command lines.

    Args:
      *regexes: over whole paths; the second law holds for each. They may cover everything.

    Raises:
      JaxdlError: no regex, or something that is not a str.

    Example:
      >>> params = {"body": {"kernel": 1.0}, "head": {"kernel": 2.0}}
      >>> paths.match(only("head/.*"), params)
      {'body': {'kernel': False}, 'head': {'kernel': True}}
      >>> paths.match(only("haed/.*"), params, what="trainable")
      Traceback (most recent call last):
      jaxdl.paths.RuleError: trainable rules: 1 problem(s)
        - rule 'haed/.*' matches nothing; nearest paths: head/kernel, body/kernel.
    """
    wrong = [regex for regex in regexes if not isinstance(regex, str)]
    if wrong or not regexes:
        raise JaxdlError(f"only{regexes!r} takes one str or more, each a regular expression: only('head/.*').")
    return [*((regex, True) for regex in regexes), (REST, False)]


def head_only(params: Tree) -> RuleList:
    """The head moves: a linear probe where the head is a linear layer.

    A head of several layers moves as a whole. BERT's pooler is frozen; where it is fresh, put `("pooler/.*", True)` in
    front.

    Raises:
      JaxdlError: there is no head, as in a language model whose logits are tied to the token embedding.

    Example:
      >>> head_only({"encoder": {"layer_0": {"kernel": 1.0}}, "head": {"kernel": 2.0}})
      [('head/.*', True), ('.*', False)]
    """
    head = [(regex, True) for regex in head_of(params)]
    if not head:
        raise JaxdlError(f"head_only: {no_head(params)}")
    return _checked([*head, (".*", False)], params, "head_only")


def last_layers(params: Tree, n: int) -> RuleList:
    """The last `n` layers of each stack move, and what comes after the layers: the final norm, the pooler, the head.

    Args:
      params: the parameters; arrays or `jax.ShapeDtypeStruct`s.
      n: at least 1.

    Raises:
      JaxdlError: there are fewer layers, no numbered layers, layers in one array (the scanned layout), or nothing
        would be frozen.

    Example:
      >>> layers = {f"layer_{i}": {"kernel": 1.0} for i in range(12)}
      >>> last_layers({"embed": {"embedding": 1.0}, "encoder": layers, "head": {"kernel": 2.0}}, 2)
      [('encoder/layer_11/.*', True), ('encoder/layer_10/.*', True), ('head/.*', True), ('.*', False)]
    """
    tree = dissect(params, "last_layers")
    short = [f"{stack or 'the model'} has {len(layers)} layers" for stack, layers in tree.stacks.items()]
    if not isinstance(n, int) or not 1 <= n <= min(map(len, tree.stacks.values())):
        raise JaxdlError(f"last_layers: n={n!r} must be at least 1 and not more than there are; {', '.join(short)}.")
    moving = [regex for layers in tree.stacks.values() for regex in layers[: -n - 1 : -1]]
    rules = [(regex, True) for regex in (*moving, *tree.outputs)]
    if len(paths.claim([regex for regex, _ in rules], base_of(params))[0]) == len(base_of(params)):
        raise JaxdlError(f"last_layers: n={n} freezes nothing, as there are no more layers; leave `trainable` out.")
    return _checked([*rules, (".*", False)], params, "last_layers")


def bitfit(params: Tree, *, has_head: bool = True) -> RuleList:
    """Every bias moves, those of norms too (BitFit, Ben Zaken et al. 2022), and the head.

    Args:
      params: the parameters.
      has_head: the head moves too, where there is one, as in the paper.

    Raises:
      JaxdlError: the model has no biases outside of its head, as Llama and T5.

    Example:
      >>> bitfit({"layer_0": {"kernel": 1.0, "bias": 2.0}})
      [('(.*/)?bias', True), ('.*', False)]
    """
    return _with_head(params, _BIASES, "bitfit", has_head, "it has no biases (Llama and T5 have none); try norm_only.")


def norm_only(params: Tree, *, has_head: bool = True) -> RuleList:
    """The scales and biases of all norms move (Frankle et al. 2021 of BatchNorm), and the head.

    Args:
      params: the parameters.
      has_head: the head moves too, where there is one.

    Raises:
      JaxdlError: the model has no norm with parameters outside of its head.

    Example:
      >>> norms = norm_only({"layer_0": {"kernel": 1.0, "mlp_norm": {"scale": 2.0}}, "head": {"bias": 3.0}})
      >>> [value for _, value in norms], norms[0]
      ([True, True, False], ('head/.*', True))
    """
    return _with_head(params, _NORMS, "norm_only", has_head, "it has no norms with a scale or bias; try bitfit.")


def freeze_embeddings(params: Tree) -> RuleList:
    """Everything moves but the embeddings: tokens, positions, patches, and their norm.

    Logits that are tied to the token embedding are made with a frozen matrix then.

    Raises:
      JaxdlError: there are none, or nothing else.

    Example:
      >>> freeze_embeddings({"embed": {"token": {"embedding": 1.0}}, "head": {"kernel": 2.0}})
      [('(.*/)?embed/.*', False), ('.*', True)]
    """
    base = base_of(params)
    for regex in _EMBEDDINGS:
        found = paths.claim([regex], base)[0]
        if len(found) == len(base):
            raise JaxdlError("freeze_embeddings: the model is nothing but embeddings; nothing would train.")
        if found:
            return _checked([(regex, False), (".*", True)], params, "freeze_embeddings")
    raise JaxdlError(
        "freeze_embeddings: there is no embed/... and no leaf called embedding; freeze what you mean with "
        f"[('...', False), ('.*', True)]. {names_of(params)}"
    )


def layerwise_decay(params: Tree, decay: float, *, trainable: Rules = ALL) -> RuleList:
    """A learning rate that falls with the distance from the output, as `lr_scale` rules.

    Layer `l` of the `L` of a stack has the factor `decay ** (L - l)`, counted from 0; what comes before the layers
    (embeddings, stem) `decay ** (L + 1)`; what comes after them 1. This is the rule of BEiT and MAE (He et al. 2022,
    table 9); the idea is that of Howard & Ruder 2018, section 3.2. Inputs that several stacks share follow the deepest.

    Args:
      params: the parameters, adapters included.
      decay: in (0, 1], such as 0.95 for BERT, 0.75 for ViT.
      trainable: the rules that the run has: rules for what is frozen are left out, since they would match nothing.

    Raises:
      JaxdlError: a decay out of range, no numbered layers, or layers in one array (the scanned layout).

    Example:
      >>> layers = {f"layer_{i}": {"kernel": 1.0} for i in range(2)}
      >>> layerwise_decay({"embed": {"embedding": 1.0}, "encoder": layers, "head": {"kernel": 2.0}}, 0.5)
      [('encoder/layer_1/.*', 0.5), ('encoder/layer_0/.*', 0.25), ('embed/.*', 0.125), ('.*', 1.0)]
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
        raise JaxdlError(f"layerwise_decay: decay={decay!r} must lie in (0, 1], such as 0.9.")
    tree = dissect(params, "layerwise_decay")
    rules: RuleList = []
    for layers in tree.stacks.values():
        rules += [(regex, float(decay) ** (k + 1)) for k, regex in enumerate(reversed(layers))]
    for regex, above in tree.inputs.items():
        depth = max(len(layers) for stack, layers in tree.stacks.items() if stack.startswith(above))
        rules.append((regex, float(decay) ** (depth + 1)))
    has_adapters = isinstance(params, Mapping) and ADAPTERS in params
    optional = f"({ADAPTERS}/)?" if has_adapters else ""
    return _alive([*((optional + regex, rate) for regex, rate in rules), (".*", 1.0)], params, trainable)


def discriminative(params: Tree, groups: Sequence[str], *, factor: float = 2.6, trainable: Rules = ALL) -> RuleList:
    """A learning rate for each group, each group `factor` times slower than the next one, as `lr_scale` rules.

    Source: discriminative fine-tuning, Howard & Ruder 2018, section 3.2.

    Args:
      params: the parameters.
      groups: a regex for each group, from the input to the output; the last has the factor 1. Every leaf must be in
        one, and a leaf that several match is in the first.
      factor: at least 1; the paper's is 2.6.
      trainable: the rules that the run has: groups that are frozen are left out, since they would match nothing.

    Raises:
      JaxdlError: a factor below 1. RuleError: groups that do not fit the tree.

    Example:
      >>> params = {"embed": {"embedding": 1.0}, "body": {"kernel": 1.0}, "head": {"kernel": 2.0}}
      >>> discriminative(params, ["embed/.*", "body/.*", "head/.*"], factor=10)
      [('embed/.*', 0.01), ('body/.*', 0.1), ('head/.*', 1.0)]
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor < float("inf"):
        raise JaxdlError(f"discriminative: factor={factor!r} must be a finite number of at least 1, such as 2.6.")
    last = len(groups) - 1
    rules = [(regex, 1.0 / float(factor) ** (last - k)) for k, regex in enumerate(groups)]
    return _alive(_checked(rules, params, "discriminative"), params, trainable)


PRESETS: dict[str, Callable[[Tree], RuleList]] = {
    "head_only": head_only,
    "bitfit": bitfit,
    "norm_only": norm_only,
    "freeze_embeddings": freeze_embeddings,
}
"""The presets that need nothing but the parameters."""


def _with_head(params: Tree, regex: str, what: str, has_head: bool, missing: str) -> RuleList:
    head = head_of(params)
    claimed = paths.claim([*head, regex], base_of(params))[0]
    if all(i < len(head) for i, _ in claimed.values()):
        raise JaxdlError(f"{what}: outside of the head the model has no such leaf: {missing}")
    return _checked([*((pattern, has_head) for pattern in head), (regex, True), (".*", False)], params, what)


def _checked(rules: RuleList, params: Tree, what: str) -> RuleList:
    paths.match(rules, params, what=what)
    return rules


def _alive(rules: RuleList, params: Tree, trainable: Rules) -> RuleList:
    """The rules that win a leaf that moves; the others would be errors in an optimizer that sees only those."""
    moving, _ = paths.split(params, paths.match(trainable, params, what="trainable"))
    claimed, _ = paths.claim([regex for regex, _ in rules], paths.flatten(moving))
    winners = {i for i, _ in claimed.values()}
    return [rule for i, rule in enumerate(rules) if i in winners]
