"""Folders from the Hugging Face hub, through `huggingface_hub` (the extra `hub`)."""

from pathlib import Path
from typing import Any

from jaxdl.pretrained.ledger import PretrainedError

FILES = ("*.safetensors", "*.json", "*.txt")
CONNECT_TIMEOUT_S = 5.0


def is_hub_name(source: str) -> bool:
    """True for `org/name`, in the letters that the hub allows.

    Example:
      >>> is_hub_name("google/bert_uncased_L-2_H-128_A-2"), is_hub_name("./runs/bert"), is_hub_name("runs")
      (True, False, False)
    """
    parts = source.split("/")
    plain = [part.replace("-", "").replace("_", "").replace(".", "") for part in parts]
    starts = all(part[:1].isalnum() for part in parts)
    return len(parts) == 2 and starts and all(part.isalnum() and part.isascii() for part in plain)


def fetch(name: str, *, revision: str | None = None) -> Path:
    """Fetches the safetensors, JSON and text files of a hub model, or finds them in the cache.

    Args:
      name: `org/name`.
      revision: a branch, tag or commit; None takes the newest.

    Returns:
      The folder in huggingface_hub's cache.

    Raises:
      PretrainedError: the library is absent, or the hub cannot be reached or has no such model, said within seconds.
    """
    remedy = f"fetch {', '.join(FILES)} of https://huggingface.co/{name} elsewhere, put them in a folder and load that"
    try:
        import huggingface_hub
    except ImportError:
        raise PretrainedError(
            f"{name} is no folder here, and a hub name needs huggingface_hub: pip install 'jaxdl[hub]'; or {remedy}."
        ) from None
    where: dict[str, Any] = {"revision": revision, "allow_patterns": list(FILES), "ignore_patterns": ["*/*"]}
    try:
        # One short question first: the library retries a download for a long time where there is no network.
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=CONNECT_TIMEOUT_S)
        return Path(huggingface_hub.snapshot_download(name, etag_timeout=CONNECT_TIMEOUT_S, **where))
    except Exception as error:  # its errors are those of several libraries beneath
        online = error
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True, **where))
    except Exception:
        reason = str(online).strip().splitlines() or [""]
        raise PretrainedError(
            f"{name} is no folder here and cannot be had from the hub ({type(online).__name__}: {reason[0][:200]}); "
            f"check the name and the network, or {remedy}."
        ) from None
