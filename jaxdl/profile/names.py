"""From what XLA keeps of JAX's names to what a person calls an operation."""

import re

_WRAPPED = re.compile(r"^(\w+)\((.*)\)$")
_MADE_BY_JAX = {
    *("closed_call", "checkpoint", "remat", "remat2", "pjit", "shard_map", "custom_jvp_call", "custom_vjp_call"),
    *("custom_vjp_call_jaxpr", "core_call", "branch_0_fun", "branch_1_fun", ""),
}
_TRANSFORMS = ("jvp", "transpose", "vmap", "remat", "rematted_computation")
FORWARD, BACKWARD, AGAIN, REST = "forward", "backward", "again", "rest"


def part_of(op_name: str) -> str:
    """Which part of a training step: `forward`, `backward`, `again` (computed a second time to save memory), `rest`.

    Example:
      >>> [part_of(f"jit(train_step)/{rest}") for rest in ("jvp(CNN)/conv", "transpose(jvp(CNN))/conv", "mul")]
      ['forward', 'backward', 'rest']
      >>> part_of("jit(train_step)/transpose(jvp(GPT))/checkpoint/rematted_computation/block_0/dot_general")
      'again'
    """
    if "rematted_computation" in op_name:
        return AGAIN
    if "transpose(" in op_name:
        return BACKWARD
    return FORWARD if "jvp(" in op_name else REST


def short_name(op_name: str) -> str:
    """The modules and the operation, without what JAX puts around them.

    The name of the whole function, that of the network itself, loops and calls are left out.

    Example:
      >>> short_name("jit(train_step)/transpose(jvp(CNN))/stage_0/conv_1/conv_general_dilated")
      'stage_0/conv_1/conv_general_dilated'
      >>> short_name("jit(train_step)/jvp(CNN)/stage_1/jit(relu)/max")
      'stage_1/relu/max'
      >>> short_name("jit(f)/jvp(LM)/while/body/closed_call/block/attention/query/dot_general")
      'block/attention/query/dot_general'
      >>> short_name("jit(step)/jvp(Net)/recurrent/recurrent._scan/layer_0/mul")
      'recurrent/layer_0/mul'
      >>> short_name("jit(step)/transpose(jvp(jit(take_along_axis)))/scatter-add")
      'take_along_axis/scatter-add'
    """
    kept: list[str] = []
    is_in_loop = False
    *segments, last = _split(op_name)
    for i, segment in enumerate(segments):
        name, is_network = _unwrap(segment)
        is_function = i == 0 and "(" in segment
        if is_in_loop and name in ("body", "cond"):
            is_in_loop = False
        elif name == "while":
            is_in_loop = True
        elif not (is_function or is_network or name in _MADE_BY_JAX or name.startswith("_") or name in _TRANSFORMS):
            module, _, method = name.partition(".")
            is_said = kept[-1:] == [name] or (method and kept[-1:] == [module])  # Flax: module/module.method
            if not is_said and "->" not in name:
                kept.append(name)
    return "/".join([*kept, _unwrap(last)[0]])


def _unwrap(segment: str) -> tuple[str, bool]:
    """The name inside of transformations, and whether it is that of what is differentiated: the network."""
    is_transformed = is_call = False
    while found := _WRAPPED.match(segment):
        is_transformed |= found[1] in _TRANSFORMS
        is_call |= found[1] not in _TRANSFORMS
        segment = found[2]
    return segment, is_transformed and not is_call


def _split(op_name: str) -> list[str]:
    """At slashes outside of brackets."""
    parts, depth = [""], 0
    for letter in op_name:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "/" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def without_numbers(name: str) -> str:
    """The name that layers alike share.

    Example:
      >>> without_numbers("block_11/mlp/up/dot_general")
      'block_*/mlp/up/dot_general'
    """
    return re.sub(r"(?<=_)\d+(?=/|$)", "*", name)
