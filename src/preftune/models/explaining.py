"""What loaders of models and tokenizers raise, as one line that names the thing and the remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from preftune.errors import ModelError, PreftuneError, SetupError


@contextmanager
def explained(name: str, where: str, kind: str) -> Iterator[None]:
    """Turn whatever the loaders raise into one line that names the thing and the remedy."""
    try:
        yield
    except (PreftuneError, KeyboardInterrupt):
        raise
    except ImportError as error:
        raise SetupError(_first_line(error), where=where, value=name) from error
    except Exception as error:
        raise _diagnosis(error, name, where, kind) from error


def _diagnosis(error: Exception, name: str, where: str, kind: str) -> ModelError:
    said = f"{type(error).__name__}: {error}"
    cause = error.__cause__ or error.__context__
    whole = said + (f" {type(cause).__name__}: {cause}" if cause else "")
    exists = os.path.exists(os.path.expanduser(name))
    if attention := re.search(r"`?attn_implementation=?`?\W{0,3}([\w|-]+)", said):
        return ModelError(
            "the model does not have this attention",
            where="attn_implementation",
            value=attention[1],
            remedy="take sdpa or eager; packed rows bring their own attention",
        )
    if "trust_remote_code" in whole:
        what, remedy = (
            f"the {kind} brings its own Python code",
            "read that code, then pass --trust_remote_code with a pinned --model_revision",
        )
    elif exists:
        what, remedy = f"cannot load the {kind} ({_first_line(error)})", "check that its files are complete"
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        what, remedy = f"no such {kind} folder", "check the path"
    elif any(word in whole for word in ("GatedRepo", "gated repo", "401", "403")):
        what, remedy = f"no access to the {kind}", "ask for access on its page, then run `hf auth login`"
    elif any(word in whole for word in ("RevisionNotFound", "not a valid git identifier")):
        what, remedy = f"the {kind} has no such revision", "check --model_revision"
    elif any(word in whole for word in ("RepositoryNotFound", "not a valid model identifier", "404")):
        what, remedy = f"no such {kind}, neither on this machine nor on the Hub", "check the name, or give a folder"
    elif any(word in whole for word in ("connect", "Connect", "ffline", "LocalEntryNotFound", "resolve", "timed out")):
        what = f"the {kind} is not on this machine and the Hub cannot be reached"
        remedy = "give the path of a folder, or try again with a network connection"
    else:
        what, remedy = f"cannot load the {kind} ({_first_line(error)})", "check the name"
    return ModelError(what, where=where, value=name, remedy=remedy)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return " ".join(text.splitlines()[0].split()).rstrip(".")[:240] if text else type(error).__name__
