"""Names of leaves, and rules over names.

Every leaf of a tree has a path such as `encoder/layer_0/kernel`. A *rule list* is an ordered sequence of
`(regex, value)` pairs; a leaf takes the value of the first rule whose regex matches its whole path. Two laws make a
typo an error instead of a silent no-op: every leaf must be covered, and every rule must win at least one leaf.
This file holds the only regular expressions over paths in the library.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jaxdl.errors import JaxdlError

Tree = Any
Rules = Sequence[tuple[str, Any]]

REST = r"(?s:.*)"
"""The last pattern of a generated list: whatever is left. It is the one pattern that may win no leaf."""


class RuleError(JaxdlError):
    """A rule list does not fit the tree it was applied to; the message lists every problem at once."""


def path_of(keys: Iterable[Any]) -> str:
    """Joins the keys of `jax.tree_util.tree_flatten_with_path` with `/`.

    Example:
      >>> [(keys, _)], _ = jax.tree_util.tree_flatten_with_path({"dense": {"kernel": 1.0}})
      >>> path_of(keys)
      'dense/kernel'
    """
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Maps the path of every leaf to the leaf, in the order of `jax.tree.leaves`.

    Works on any pytree: dicts of any kind, tuples, dataclasses such as `TrainState`.

    Args:
      tree: any pytree. `None` is an empty subtree and has no path.

    Raises:
      ValueError: two leaves have the same path (a key holds a `/`).

    Example:
      >>> flatten({"b": 2, "a": {"kernel": 1}})
      {'a/kernel': 1, 'b': 2}
    """
    leaves_with_keys, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {path_of(keys): leaf for keys, leaf in leaves_with_keys}
    if len(flat) != len(leaves_with_keys):
        paths = [path_of(keys) for keys, _ in leaves_with_keys]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"Two leaves share one path: {twice}. Rename a key so that no key contains '/'.")
    return flat


def match(rules: Rules, tree: Tree, *, what: str = "rules") -> Tree:
    """Gives every leaf of `tree` the value of the first rule that matches its whole path.

    The tree may be parameters or a whole `TrainState`: an optimizer's moments contain the path of their parameter
    (`opt_state/0/mu/dense/kernel`), so that `.*dense/kernel` speaks of both.

    Args:
      rules: ordered `(regex, value)` pairs; the regex must match the full path (`re.fullmatch`).
      tree: any pytree; only its structure is read, so `jax.eval_shape` results do.
      what: the name of the rule list, for the error message (`trainable`, `weight_decay`).

    Returns:
      A tree of the same structure that holds a rule value in the place of every leaf.

    Raises:
      RuleError: leaves that no rule covers, rules that win no leaf, and invalid regexes, all in one message with
        the nearest real paths.

    Example:
      >>> params = {"body": {"kernel": 1, "bias": 2}, "head": {"kernel": 3}}
      >>> match([("head/.*", True), (".*", False)], params, what="trainable")
      {'body': {'bias': False, 'kernel': False}, 'head': {'kernel': True}}

    The result is also a mask for an Optax chain of your own; as a function, it fits the trainable half too:

      >>> import functools, optax
      >>> kernels = functools.partial(match, [(".*/kernel", True), (".*", False)])
      >>> decay = optax.add_decayed_weights(0.1, mask=kernels)
      >>> updates, _ = decay.update(jax.tree.map(lambda w: 0.0, params), decay.init(params), params)
      >>> updates["body"]["bias"], round(updates["body"]["kernel"], 6)
      (0.0, 0.1)
      >>> labels = functools.partial(match, [("head/.*", "fast"), (".*", "slow")])
      >>> tx = optax.partition({"fast": optax.sgd(1.0), "slow": optax.sgd(0.1)}, labels)
    """
    paths = list(flatten(tree))
    problems = [f"rule {i} is {rule!r}; a rule is a pair (regex, value)." for i, rule in _not_pairs(rules)]
    pairs = [rule for i, rule in enumerate(rules) if i not in dict(_not_pairs(rules))]
    claimed, more = claim([regex for regex, _ in pairs], paths)
    problems += more + _uncovered([path for path in paths if path not in claimed])
    if problems:
        raise RuleError.listing(f"{what} rules", problems)
    return jax.tree.unflatten(jax.tree.structure(tree), [pairs[claimed[path][0]][1] for path in paths])


def _not_pairs(rules: Sequence[Any]) -> list[tuple[int, Any]]:
    return [
        (i, rule)
        for i, rule in enumerate(rules)
        if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str))
    ]


def _uncovered(missed: list[str]) -> list[str]:
    if not missed:
        return []
    shown = ", ".join(missed[:8]) + (f" and {len(missed) - 8} more" if len(missed) > 8 else "")
    return [f"no rule covers {shown}; end the list with ('.*', default) or name them."]


def claim(
    patterns: Sequence[str], paths: Iterable[str], *, what: str = "rule"
) -> tuple[dict[str, tuple[int, re.Match[str]]], list[str]]:
    """Gives each path to the first pattern that matches the whole of it.

    Args:
      patterns: regular expressions.
      paths: the real paths.
      what: how a problem calls a pattern.

    Returns:
      `({path: (number of the pattern, its match)}, problems)`: a line for each pattern that is invalid or wins no path.

    Example:
      >>> claimed, problems = claim(["head/.*", "haed/.*"], ["body/kernel", "head/kernel"])
      >>> {path: i for path, (i, _) in claimed.items()}, problems
      ({'head/kernel': 0}, ["rule 'haed/.*' matches nothing; nearest paths: head/kernel, body/kernel."])
    """
    paths, problems = list(paths), []
    claimed: dict[str, tuple[int, re.Match[str]]] = {}
    for i, pattern in enumerate(patterns):
        try:
            hits = {path: (i, hit) for path in paths if (hit := re.fullmatch(pattern, path))}
        except re.error as error:
            problems.append(f"{what} {pattern!r} is not a regular expression: {error}.")
            continue
        if not hits:
            near = ", ".join(nearest(pattern, paths)) or "there are none"
            problems.append(f"{what} {pattern!r} matches nothing; nearest paths: {near}.")
        elif hits.keys() <= claimed.keys() and pattern != REST:
            taken = next(iter(hits))
            problems.append(f"{what} {pattern!r} only matches leaves that earlier rules took ({taken}); move it up.")
        claimed = {**hits, **claimed}
    return {path: claimed[path] for path in paths if path in claimed}, problems


def rename(rules: Sequence[tuple[str, str]], paths: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Renames paths by `(regex, replacement)` pairs, as `re.sub` does on the whole path; the first match wins.

    Args:
      rules: `("encoder/(.*)", r"enc/\\1")`.
      paths: the old paths; one that no rule matches keeps its name.

    Returns:
      `({new path: old path}, problems)`.

    Example:
      >>> rename([("encoder/(.*)", r"enc/\\1")], ["encoder/kernel", "head/kernel"])
      ({'enc/kernel': 'encoder/kernel', 'head/kernel': 'head/kernel'}, [])
    """
    paths = list(paths)
    claimed, problems = claim([pattern for pattern, _ in rules], paths, what="rename rule")
    named: dict[str, str] = {}
    for old in paths:
        i, hit = claimed.get(old, (0, None))
        try:
            new = hit.expand(rules[i][1]) if hit else old
        except (re.error, IndexError) as error:
            problems.append(f"rename rule {rules[i][0]!r} has a wrong replacement: {error}.")
            continue
        if new in named:
            problems.append(f"{named[new]} and {old} both become {new}; rename or drop one of them.")
        named[new] = old
    return named, problems


def nearest(name: str, candidates: Iterable[str], *, n: int = 3) -> list[str]:
    """The candidates most similar to a misspelt name or pattern, best first.

    A pattern of k segments is compared with the first k segments of each candidate as well as with the whole, so
    that `haed/.*` finds `head/kernel`.

    Args:
      name: a name, or a regex over paths.
      candidates: the real names.
      n: how many at the most.

    Example:
      >>> nearest("learning_rte", ["momentum", "learning_rate", "name"], n=1)
      ['learning_rate']
    """
    plain = re.sub(r"[\\^$.*+?()\[\]{}|]", "", name).strip("/").lower()
    n_segments = plain.count("/") + 1

    def similarity(candidate: str) -> float:
        whole = candidate.lower()
        prefix = "/".join(whole.split("/")[:n_segments])
        return max(difflib.SequenceMatcher(None, plain, text).ratio() for text in (whole, prefix))

    return sorted(candidates, key=lambda candidate: (-similarity(candidate), len(candidate)))[:n]


def split(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Parts a tree in two of the same shape, with `None` where a leaf went to the other half.

    Args:
      tree: any pytree.
      mask: the same paths with bool leaves, in any kind of mapping.

    Returns:
      `(chosen, rest)`: the leaves whose mask is True, and the others. `merge` puts them together again.

    Raises:
      ValueError: the mask and the tree do not have the same paths, or a mask leaf is not a bool.

    Example:
      >>> split({"a": 1, "b": 2}, {"a": True, "b": False})
      ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    flat, chosen = flatten(tree), flatten(mask)
    if flat.keys() != chosen.keys():
        only_tree, only_mask = sorted(flat.keys() - chosen.keys()), sorted(chosen.keys() - flat.keys())
        raise ValueError(f"mask and tree differ: only in the tree {only_tree}, only in the mask {only_mask}.")
    wrong = [path for path, value in chosen.items() if not isinstance(value, bool)]
    if wrong:
        raise ValueError(f"mask leaves must be bool; these are not: {wrong}.")
    treedef = jax.tree.structure(tree)
    yes = [leaf if chosen[path] else None for path, leaf in flat.items()]
    no = [None if chosen[path] else leaf for path, leaf in flat.items()]
    return jax.tree.unflatten(treedef, yes), jax.tree.unflatten(treedef, no)


def merge(a: Tree, b: Tree) -> Tree:
    """Puts the two halves of `split` together.

    Args:
      a: a tree with `None` where `b` has a leaf.
      b: a tree with `None` where `a` has a leaf.

    Raises:
      ValueError: a leaf is present in both.

    Example:
      >>> merge({"a": 1, "b": None}, {"a": None, "b": 2})
      {'a': 1, 'b': 2}
    """
    both = sorted(flatten(a).keys() & flatten(b).keys())
    if both:
        raise ValueError(f"cannot merge: both trees have a leaf at {both}; each leaf must be in one of them.")
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)
