"""The process behind the live page that loads models and data: requests on standard input, answers on standard output.

One line of JSON each. The first one names the current folder. ``{"work": "stop"}`` ends what goes on; the end of the
input ends the process, so that none is left behind by a server that was killed.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from preftune.config.secrets import redact
from preftune.errors import PreftuneError, printable
from preftune.ui.generate import Bench, Stopped
from preftune.ui.rows import Rows


def main() -> None:
    """Answer until the input ends."""
    # What libraries print goes to the terminal, and not between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    stop = threading.Event()
    waiting: queue.Queue[dict[str, Any]] = queue.Queue()
    os.chdir(json.loads(sys.stdin.readline())["folder"])
    threading.Thread(target=_listen, args=(waiting, stop), daemon=True).start()
    bench, rows = Bench(stop.is_set), Rows()
    while True:
        request = waiting.get()
        stop.clear()
        answers.write(json.dumps(_answer(bench, rows, request)) + "\n")
        answers.flush()


def _listen(waiting: queue.Queue[dict[str, Any]], stop: threading.Event) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if request["work"] == "stop":
            stop.set()
        else:
            waiting.put(request)
    os._exit(0)


def _answer(bench: Bench, rows: Rows, request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["folder"])
    try:
        if request["work"] == "prompt":
            return {"ok": bench.answer(folder, request["content"])}
        return {"ok": rows.page(folder, request["start"])}
    except Stopped:
        return {"error": "stopped"}
    except PreftuneError as error:
        return {"error": str(redact(str(error)))}
    except Exception as error:
        # A folder of somebody else's, a library's bug: the next request may well succeed.
        said = " ".join(str(error).split())[:300]
        return {"error": printable(str(redact(f"{request['work']}: {type(error).__name__}: {said}")))}


if __name__ == "__main__":
    main()
