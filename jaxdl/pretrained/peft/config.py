"""adapter_config.json of PEFT: what it says of modules, ranks and scales, read and written."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxdl.pretrained.ledger import PretrainedError

CONFIG = "adapter_config.json"
UNTOUCHED_BASE = (True, False, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the base alone
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
TASK_MODULES = {  # what PEFT puts in modules_to_save by itself
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    "init_lora_weights",
}
_WITHOUT_EFFECT = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size", "runtime_config", "fan_in_fan_out", "eva_config", "ensure_weight_tying"),
}
_NAMES = {  # lists of these, or one of them
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"), str),
    "layers_to_transform": int,
}
_EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Reads adapter_config.json, and refuses what jaxdl cannot do the like of.

    Args:
      folder: that `save_pretrained` of a PEFT model wrote.

    Returns:
      The fields, with PEFT's defaults for those that matter and are absent.

    Raises:
      PretrainedError: no such file, no JSON, or settings that are not supported: all of them in one message.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise PretrainedError(f"{folder / CONFIG} cannot be read: {error.strerror}; an adapter needs it.") from None
    except ValueError as error:
        raise PretrainedError(f"{folder / CONFIG} is no JSON ({error}); fetch it again.") from None
    if not isinstance(config, dict):
        raise PretrainedError(f"{folder / CONFIG} is no JSON object; fetch it again.")
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none"}
    config = {**defaults, "init_lora_weights": True, **config}
    config |= {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    if problems := config_problems(config):
        raise PretrainedError.listing(f"{folder / CONFIG}", problems)
    return config


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """A line for each setting that cannot be loaded.

    Example:
      >>> config_problems({"peft_type": "IA3", "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
      ...   "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}})
      ["peft_type='IA3' is not supported, only 'LORA'; merge it into its base with PEFT and load that."]
    """
    problems = []
    if (kind := config.get("peft_type")) != "LORA":
        problems.append(
            f"peft_type={kind!r} is not supported, only 'LORA'; merge it into its base with PEFT and load that."
        )
    if config["bias"] != "none":
        problems.append(f"bias={config['bias']!r} is not supported, only 'none'; merge it with PEFT and load that.")
    init = config["init_lora_weights"]
    if init not in UNTOUCHED_BASE:
        problems.append(
            f"init_lora_weights={init!r} changes the base beside the adapter; save it with "
            "path_initial_model_for_weight_conversion=..., which makes a plain LoRA of it."
        )
    others = {name: value for name, value in config.items() if name not in _READ | _WITHOUT_EFFECT}
    problems += [
        f"{name}={value!r} is not supported; merge the adapter with PEFT and load that."
        for name, value in others.items()
        if value not in _EMPTY
    ]
    return problems + (_wrong_kinds(config) or _wrong_values(config))


def _wrong_kinds(config: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{name}={config[name]!r} must be an object of names and numbers."
        for name in ("rank_pattern", "alpha_pattern")
        if not isinstance(config[name], dict)
    ]
    for name, kinds in _NAMES.items():
        value = config.get(name)
        is_list = isinstance(value, list) and all(isinstance(item, kinds) for item in value)
        if not (value is None or is_list or (isinstance(value, kinds) and name != "modules_to_save")):
            problems.append(f"{name}={value!r} must be a list of {kinds.__name__}.")
    return problems


def _wrong_values(config: Mapping[str, Any]) -> list[str]:
    ranks = {"r": config["r"]} | {f"rank_pattern[{key!r}]": rank for key, rank in config["rank_pattern"].items()}
    alphas = {"lora_alpha": config["lora_alpha"]}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in config["alpha_pattern"].items()}
    problems = [f"{name}={x!r} must be an int of at least 1." for name, x in ranks.items() if not _is_positive(x, int)]
    problems += [f"{name}={x!r} must be positive." for name, x in alphas.items() if not _is_positive(x, (int, float))]
    rate = config["lora_dropout"]
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        problems.append(f"lora_dropout={rate!r} must be at least 0 and less than 1.")
    for pattern in _patterns(config):
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{pattern!r} is not a regular expression: {error}.")
    return problems


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _patterns(config: Mapping[str, Any]) -> list[str]:
    strings = [config.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    found = [*config["rank_pattern"], *config["alpha_pattern"], *(config.get("modules_to_save") or [])]
    return found + [text for text in strings if isinstance(text, str)]


def rank_and_alpha(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """The rank and alpha of a module, by PEFT's rule for patterns.

    Example:
      >>> config = {"r": 8, "lora_alpha": 16, "rank_pattern": {"c_attn": 24}, "alpha_pattern": {}}
      >>> rank_and_alpha(config, "transformer.h.0.attn.c_attn"), rank_and_alpha(config, "lm_head")
      ((24, 16), (8, 16))
    """

    def find(patterns: Mapping[str, Any], default: Any) -> Any:
        return next((x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    return find(config["rank_pattern"], config["r"]), find(config["alpha_pattern"], config["lora_alpha"])


def is_target(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether PEFT adapts a module, by its rules: a str is a regex, a list has ends of names.

    Returns:
      None where the config does not tell: `target_modules` is absent or "all-linear".

    Example:
      >>> config = {"target_modules": ["query", "value"], "layers_to_transform": [1]}
      >>> [is_target(config, f"bert.encoder.layer.{i}.attention.self.query") for i in (0, 1)]
      [False, True]
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    is_excluded = bool(re.fullmatch(excluded, module)) if isinstance(excluded, str) else _ends(module, excluded)
    kept = config.get("modules_to_save") or []
    if is_excluded or any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in kept):
        return False
    if targets is None or targets == "all-linear":
        return None
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, module))
    return _ends(module, targets) and _is_in_layers(config, module)


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    regexes = [rf"(?:^|.*?\.){pattern}\.(?P<i>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<i>\d+)\."]
    found = (re.match(regex, module) for regex in regexes)
    hit = next(filter(None, found), None)
    return hit is not None and int(hit["i"]) in ([layers] if isinstance(layers, int) else layers)


def task_of(architecture: str) -> str | None:
    """PEFT's name of what a class of transformers is for; None for backbones, images and masked words.

    Example:
      >>> task_of("BertForSequenceClassification"), task_of("ViTForImageClassification")
      ('SEQ_CLS', None)
    """
    return next((task for end, task in TASKS.items() if architecture.endswith(end)), None)
