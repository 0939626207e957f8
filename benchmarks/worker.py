"""The child process of one competitor: sets it up, then does what the parent asks for, one line at a time.

    python -m benchmarks.worker

Standard input holds requests: `{"call": "set_up", "target": "module:Class", "arguments": {...}}`, then
`{"call": "facts"}` and calls of its methods. Standard output holds the answers, `{"ok": ...}` or `{"error": ...}`; what
libraries print goes to standard error.
"""

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    """Serves until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    competitor: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["call"] == "set_up":
                competitor = _load(request["target"])(**request["arguments"])
                answer: dict[str, Any] = {"ok": None}
            elif request["call"] == "facts":
                answer = {"ok": getattr(competitor, "facts", {})}
            else:
                answer = {"ok": getattr(competitor, request["call"])(**request["arguments"])}
        except ModuleNotFoundError as error:
            answer = {"error": f"{error.name} is missing: pip install 'jaxdl[bench]'" if error.name else str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)  # threads of a competitor that is still at work must not keep the process


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    main()
