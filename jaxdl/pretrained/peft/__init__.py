"""LoRA adapters in PEFT's format, in and out: `adapter_model.safetensors` and `adapter_config.json`."""

from jaxdl.pretrained.peft.load import load_peft
from jaxdl.pretrained.peft.save import save_peft

__all__ = ["load_peft", "save_peft"]
