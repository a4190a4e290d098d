"""Code that comes with weights: it runs only when asked for, and then that of one commit which is named and recorded.

A branch or tag can be moved after its code was read. So the commit it stands for is looked up once, and model,
tokenizer and code are loaded at exactly that commit by this process, however often they are loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.errors import ModelError
from preftune.files import parse_json
from preftune.models.explaining import explained
from preftune.models.locating import located

#: Files that may name classes of their own, by what is loaded.
MODEL_FILES = ("config.json",)
TOKENIZER_FILES = ("tokenizer_config.json", "config.json")

_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_FLAGS = {"model_name_or_path": "--model_revision", "ref_model_name_or_path": "--ref_model_revision"}
# (name, revision asked for) -> commit, and what was said and is recorded: both for the life of the process.
_COMMITS: dict[tuple[str, str], str] = {}
_USED: dict[tuple[str, str | None], dict[str, str | None]] = {}


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit, which nobody can move."""
    return bool(revision and _COMMIT.match(revision))


def trusted_code() -> list[dict[str, str | None]]:
    """Where this process was allowed to run code from: ``name``, ``asked`` revision and ``commit`` of each.

    The commit of a local folder is ``None``.
    """
    return [dict(entry) for entry in _USED.values()]


def pinned(
    name: str,
    keywords: Mapping[str, Any],
    *,
    where: str = "model_name_or_path",
    files: Sequence[str] = MODEL_FILES,
) -> dict[str, Any]:
    """Keywords for ``from_pretrained`` under which code can only come from one known commit.

    Args:
        name: Folder or name on the Hub.
        keywords: As they would be handed over; without ``trust_remote_code`` they come back as they are.
        where: Setting that holds the name.
        files: Which of its files name the classes to be loaded.

    Returns:
        A copy. For a name on the Hub ``revision`` is the commit, and so is ``code_revision`` where there is code.

    Raises:
        ModelError: The commit cannot be found out, or the code is spread over several repositories.
    """
    result = dict(keywords)
    if not result.get("trust_remote_code"):
        return result
    folder = Path(name).expanduser()
    if not folder.is_dir():
        result["revision"] = commit_of(name, result.get("revision"), where, result.get("token"))
    places = _code_places(name, folder, result, files)
    foreign = [place for place in places if place is not None]
    if folder.is_dir() and None in places:
        _note_folder(name)
    if len(foreign) > 1 or (foreign and None in places and not folder.is_dir()):
        raise ModelError(
            "its code is spread over several repositories, which cannot be pinned together",
            where=where,
            value=name,
            allowed="code in one repository",
            remedy="download it, put the code beside the weights, and give the folder",
        )
    if foreign:
        result["code_revision"] = commit_of(foreign[0], result.get("code_revision"), where, result.get("token"))
    elif places and not folder.is_dir():
        asked = result.get("code_revision")
        result["code_revision"] = commit_of(name, asked, where) if asked else result["revision"]
    return result


def commit_of(name: str, revision: str | None, where: str, token: Any = None) -> str:
    """The commit that a revision of a Hub repository stands for, looked up once per process.

    Args:
        name: Name on the Hub.
        revision: Branch, tag or commit; ``main`` by default.
        where: Setting that holds the name.
        token: For repositories that are not public.

    Returns:
        Forty hexadecimal digits.

    Raises:
        ModelError: It cannot be found out.
    """
    asked = revision or "main"
    if is_commit(asked):
        _USED.setdefault((name, asked), {"name": name, "asked": asked, "commit": asked})
        return asked
    if (name, asked) not in _COMMITS:
        found = _look_up(name, asked, where, token)
        _COMMITS[name, asked] = found
        _USED[name, found] = {"name": name, "asked": asked, "commit": found}
        flag = _FLAGS.get(where)
        how = f"; {flag} {found} pins it" if flag else ""
        warnings.warn(
            f"trust_remote_code: {name} is loaded, and its code run, at commit {found} ({asked} at this moment){how}",
            UserWarning,
            stacklevel=3,
        )
    return _COMMITS[name, asked]


def load_adapter(name: str, keywords: Mapping[str, Any], *, trained: bool, where: str = "model_name_or_path") -> Any:
    """Load an adapter with its base model; the base's code is pinned like any other.

    Args:
        name: The adapter's folder or name on the Hub.
        keywords: For ``from_pretrained``.
        trained: Whether the adapter goes on being trained.
        where: Setting that holds the name.

    Returns:
        The ``PeftModel``.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    own = {key: keywords[key] for key in ("trust_remote_code", "code_revision") if key in keywords}
    rest = {key: value for key, value in keywords.items() if key not in own}
    folder = Path(name).expanduser()

    class Base:
        """What PEFT loads the base model with."""

        @staticmethod
        def from_pretrained(base: str, revision: str | None = None, **more: Any) -> Any:
            """Load the base from where it is, at the commit that is known."""
            place = located(base, folder)
            asked = {**more, **own, "revision": revision or "main"}
            with explained(place, where, "adapter's base model"):
                return AutoModelForCausalLM.from_pretrained(place, **pinned(place, asked, where=where))

    # PEFT reads a tokenizer beside the adapter too, at no revision in particular: only one on this disk may bring code.
    trusts = bool(keywords.get("trust_remote_code"))
    if trusts and folder.is_dir() and set(_code_places(name, folder, {}, TOKENIZER_FILES[:1])) <= {None}:
        rest["trust_remote_code"] = True
        # Base.from_pretrained hands its own over, so that nothing is given twice.
    pinning = type("PinnedAutoPeftModel", (AutoPeftModelForCausalLM,), {"_target_class": Base})
    return pinning.from_pretrained(name, is_trainable=trained, **rest)  # type: ignore[attr-defined]


def _note_folder(name: str) -> None:
    if (name, None) in _USED:
        return
    _USED[name, None] = {"name": name, "asked": None, "commit": None}
    warnings.warn(
        f"trust_remote_code: Python code in the folder {name} is run as it lies there", UserWarning, stacklevel=4
    )


def _code_places(name: str, folder: Path, keywords: Mapping[str, Any], files: Sequence[str]) -> list[str | None]:
    """Repositories that the classes come from; ``None`` stands for the model's own."""
    found: dict[str | None, None] = {}
    for file in files:
        for reference in _references(_settings(name, folder, keywords, file).get("auto_map")):
            repository, dashes, _ = reference.partition("--")
            found[repository if dashes and repository != name else None] = None
    return list(found)


def _references(auto_map: Any) -> list[str]:
    if isinstance(auto_map, str):
        return [auto_map]
    if isinstance(auto_map, Mapping):
        auto_map = list(auto_map.values())
    return [text for entry in auto_map for text in _references(entry)] if isinstance(auto_map, list) else []


def _settings(name: str, folder: Path, keywords: Mapping[str, Any], file: str) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    path: Any = folder / file
    if not folder.is_dir():
        passed = {key: keywords[key] for key in ("revision", "token", "cache_dir", "subfolder") if keywords.get(key)}
        # What cannot be had here, the loader will not have either.
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **passed,
        )
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}


def _look_up(name: str, revision: str, where: str, token: Any) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    reason = "the Hub does not say"
    try:
        found = HfApi().model_info(name, revision=revision, token=token).sha
        if is_commit(found):
            return str(found)
    except Exception as error:
        reason = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
        answered = isinstance(error, HfHubHTTPError) and error.response is not None
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) or answered:
            # The Hub has answered: what an old copy says does not count.
            raise _unresolved(name, revision, where, reason) from error
    for file in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        # A copy remembers which commit each branch stood for when it was made.
        try:
            copy = try_to_load_from_cache(name, file, revision=revision)
        except ValueError:
            break
        if isinstance(copy, str) and (match := re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", copy)):
            return match[1]
    raise _unresolved(name, revision, where, reason)


def _unresolved(name: str, revision: str, where: str, reason: str) -> ModelError:
    flag = _FLAGS.get(where)
    pin = f"give the commit whose code you have read as {flag}, or " if flag else ""
    return ModelError(
        f"trust_remote_code runs the code of one known commit, and that of {revision!r} cannot be found out ({reason})",
        where=where,
        value=name,
        remedy=f"{pin}download the model and give its folder",
    )
