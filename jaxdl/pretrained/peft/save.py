"""LoRA adapters out: the folder that `peft.PeftModel.from_pretrained` loads."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from jaxdl.finetune.adapters import COLLECTION, nest
from jaxdl.finetune.lora import Lora
from jaxdl.paths import Tree
from jaxdl.pretrained.family import Family
from jaxdl.pretrained.ledger import PretrainedError, shortened
from jaxdl.pretrained.mapping import to_tensors
from jaxdl.pretrained.peft.base import BASE, base_record, unrolled_leaves
from jaxdl.pretrained.peft.config import CONFIG
from jaxdl.pretrained.peft.factors import pair_tensors
from jaxdl.pretrained.peft.outline import FILE, PREFIX
from jaxdl.pretrained.peft.places import endings, is_below
from jaxdl.pretrained.peft.plan import Module, Plan, all_modules, make_plan, reached
from jaxdl.pretrained.tensors import write_atomically, write_file


def save_peft(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Tree,
    settings: Lora,
    *,
    base: str | None = None,
    saved: Sequence[str] = (),
    family: Family | None = None,
) -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads on the base; it appears complete or not at all.

    GPT-2's fused `c_attn` is one module for PEFT. Adapters of query, key and value that share one `a` (as `load_peft`
    makes them) become one of the same rank. Others become one of the sum of their ranks: the three `a` side by side,
    `b` in blocks with zeros between, and an alpha that leaves `alpha / rank` as it was.
    An adapter of a tied embedding is written for each module that uses it: T5's two tables, the output (`lm_head`).
    A file beside PEFT's, `jaxdl_base.json`, says by a hash of each leaf which base the adapter belongs to.

    Args:
      path: a folder that does not exist yet, or is empty.
      model: of one of jaxdl's families, in either layout.
      params: with `adapters`, of LoRA only.
      settings: of the adapters.
      base: `base_model_name_or_path`: where the base can be found, for whoever loads the adapter.
      saved: regexes over leaf paths (of the unrolled layout) that moved and are written whole, such as `head/.*`:
        PEFT's `modules_to_save`. It takes whole modules, so the other leaves of such a module are written too; the
        head of a text classifier or of question answering always is.
      family: as in `load`.

    Raises:
      PretrainedError: adapters that have no place in PEFT's format or are another model's, rules that match nothing, or
        a folder that is not empty; nothing is written then.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise PretrainedError(
            f"{path} is not empty; give a new folder, so that no file of another adapter stays in it."
        )
    plan, problems = make_plan(model, params, settings, saved, family)
    if problems:
        raise PretrainedError.listing("this has no form in PEFT", shortened(problems, "problems"))
    tensors = {**_lora_tensors(plan), **_whole_tensors(plan, params)}
    tensors = {PREFIX + name: np.asarray(x, order="C") for name, x in sorted(tensors.items())}
    config = {**_config(plan, settings), "base_model_name_or_path": base}
    whole = {path for entry in plan.whole for path in entry.paths}
    record = base_record({name: tree for name, tree in params.items() if name != COLLECTION}, whole)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_file(temporary / FILE, tensors)
        for name, content in ((BASE, record), (CONFIG, config)):
            write_atomically(temporary / name, [json.dumps(content, indent=2).encode(), b"\n"])
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lora_tensors(plan: Plan) -> dict[str, np.ndarray]:
    return {
        f"{module.name}.{end}": tensor
        for module in plan.modules
        for end, tensor in pair_tensors(module.place, module.pair).items()
    }


def _whole_tensors(plan: Plan, params: Tree) -> dict[str, np.ndarray]:
    """The tensors of `modules_to_save`, second names included, as PEFT asks for every tensor of such a module."""
    modules = reached(plan, plan.kept)
    ties = [tie for tie in plan.outline.known.tied if is_below(plan.name(tie.tensor), modules)]
    sources = {tie.source for tie in ties}
    entries = [e for e in plan.outline.lines if e in plan.whole or sources & {*e.tensors}]
    wanted = {path for entry in entries for path in entry.paths}
    leaves = {path: np.asarray(leaf) for path, leaf in unrolled_leaves(params) if path in wanted}
    tensors = to_tensors(entries, nest(leaves)) if entries else {}
    tensors |= {tie.tensor: tensors[tie.source] for tie in ties}
    return {plan.name(name): x for name, x in tensors.items() if is_below(plan.name(name), modules)}


def _config(plan: Plan, settings: Lora) -> dict[str, Any]:
    names = [module.name for module in plan.modules]
    most = Counter(rank for module in plan.modules for rank in module.ranks).most_common(1)[0][0]
    ranks = {module.name: module.pair.b.shape[0] for module in plan.modules}
    alphas = {module.name: _alpha(module, settings) for module in plan.modules}
    alpha = _whole_number(settings.alpha)
    return {
        "peft_type": "LORA",
        "task_type": plan.task,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": most,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout_rate,
        "target_modules": endings(names, all_modules(plan) - {*names}),
        "rank_pattern": _patterns(ranks, most),
        "alpha_pattern": _patterns(alphas, alpha),
        "modules_to_save": plan.kept or None,
        "use_rslora": settings.is_rank_stabilized,
        "use_dora": settings.has_magnitude,
        "fan_in_fan_out": any(module.place.is_input_first for module in plan.modules),
        "bias": "none",
        "init_lora_weights": True,
    }


def _alpha(module: Module, settings: Lora) -> float:
    """The alpha that gives a module of joined adapters the scale of the first of them."""
    ratio = module.pair.b.shape[0] / module.ranks[0]
    return _whole_number(settings.alpha * (ratio**0.5 if settings.is_rank_stabilized else ratio))


def _whole_number(x: float) -> float:
    return int(x) if float(x).is_integer() else x


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """`{end of names: value}` of the modules that do not have the default."""
    patterns = {}
    for value in sorted({*values.values()} - {default}):
        own = [name for name, x in values.items() if x == value]
        patterns.update(dict.fromkeys(endings(own, values.keys() - own), value))
    return patterns
