"""A GGUF file through llama.cpp's own converter, and a smaller one through its quantiser, where they are at hand."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from preftune.errors import ConfigError, SetupError
from preftune.files import replacing

#: Types that the converter writes by itself.
CONVERTED = ("f32", "f16", "bf16", "q8_0")
#: Types that need ``llama-quantize`` after it.
QUANTISED = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k", "q4_0", "q5_0", "iq4_nl", "iq4_xs")
CONVERTER = "convert_hf_to_gguf.py"
#: Where llama.cpp is, for those who do not install it into PATH.
VARIABLE = "LLAMA_CPP"


@dataclass(frozen=True)
class Tools:
    """What was found of llama.cpp.

    Attributes:
        converter: Its ``convert_hf_to_gguf.py``, or ``None``.
        quantiser: Its ``llama-quantize``, or ``None``.
    """

    converter: Path | None
    quantiser: Path | None


def find_tools(given: str | None = None) -> Tools:
    """Look for llama.cpp's programs: where it is said, in ``$LLAMA_CPP``, and in ``PATH``.

    Args:
        given: Folder of llama.cpp, or the converter itself.

    Returns:
        What was found.

    Raises:
        ConfigError: There is no converter where it is said to be.
    """
    places: list[Path] = []
    if given is not None:
        path = Path(given).expanduser()
        converter = path / CONVERTER if path.is_dir() else path
        if not converter.is_file():
            raise ConfigError(
                "no converter there", where="--llama_cpp", value=given, allowed=f"llama.cpp's folder, with {CONVERTER}"
            )
        return Tools(converter, _first("llama-quantize", [converter.parent]))
    if os.environ.get(VARIABLE):
        places.append(Path(os.environ[VARIABLE]).expanduser())
    return Tools(_first(CONVERTER, places), _first("llama-quantize", places))


def check_type(kind: str) -> str:
    """The type in the spelling used here.

    Raises:
        ConfigError: There is no such type.
    """
    if kind.lower() not in (*CONVERTED, *QUANTISED):
        raise ConfigError(
            "not a GGUF type", where="--gguf", value=kind, allowed=", ".join((*CONVERTED, *QUANTISED)).lower()
        )
    return kind.lower()


def convert(folder: Path, kind: str, dtype: str, tools: Tools) -> Path:
    """Write a GGUF file into an exported folder.

    Args:
        folder: The folder.
        kind: Type of its weights, one of :data:`CONVERTED` or :data:`QUANTISED`.
        dtype: Type of the folder's weights.
        tools: What was found of llama.cpp.

    Returns:
        The file.

    Raises:
        SetupError: A program is missing, or failed; the exported folder is as it was.
    """
    target = folder / f"model-{kind}.gguf"
    first = kind if kind in CONVERTED else _whole(dtype)
    if tools.converter is None or (kind in QUANTISED and tools.quantiser is None):
        missing = CONVERTER if tools.converter is None else "llama-quantize"
        raise SetupError(
            f"no GGUF file: llama.cpp's {missing} is not at hand",
            where="--gguf",
            value=kind,
            remedy=f"get llama.cpp, then run {by_hand(folder, kind, dtype)}; or name its folder with --llama_cpp or "
            f"${VARIABLE}",
        )
    with replacing(target) as beside:
        step = beside if kind in CONVERTED else beside.with_suffix(".whole")
        try:
            known = by_hand(folder, kind, dtype)
            run([sys.executable, str(tools.converter), str(folder), "--outtype", first, "--outfile", str(step)], known)
            if kind in QUANTISED:
                run([str(tools.quantiser), str(step), str(beside), kind.upper()], known)
        finally:
            if step != beside:
                step.unlink(missing_ok=True)
        if not beside.is_file():
            raise SetupError("llama.cpp's converter wrote nothing", where="--gguf", value=kind)
    return target


def by_hand(folder: Path, kind: str, dtype: str) -> str:
    """The command that does the same."""
    whole = kind if kind in CONVERTED else _whole(dtype)
    file = folder / f"model-{whole}.gguf"
    place, out = shlex.quote(str(folder)), shlex.quote(str(file))
    command = f"python llama.cpp/{CONVERTER} {place} --outtype {whole} --outfile {out}"
    if kind in QUANTISED:
        command += f" && llama-quantize {out} {shlex.quote(str(folder / f'model-{kind}.gguf'))} {kind.upper()}"
    return command


def run(command: list[str], by_hand: str) -> None:
    """Run a program of llama.cpp's.

    Args:
        command: The command line.
        by_hand: What to run to see all that it says.

    Raises:
        SetupError: It failed; with the last line that it said.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise SetupError(f"cannot be started ({error.strerror})", where="--gguf", value=command[0]) from error
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise SetupError(
            f"llama.cpp failed with code {done.returncode} ({said[-1][:200] if said else 'it said nothing'})",
            where="--gguf",
            value=Path(command[1] if command[0] == sys.executable else command[0]).name,
            remedy=f"to see all that it says: {by_hand}",
        )


def _whole(dtype: str) -> str:
    """The type in which nothing is lost before quantising."""
    return {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]


def _first(name: str, places: list[Path]) -> Path | None:
    inside = ("", "build/bin", "bin")
    candidates = [place / folder / name for place in places for folder in inside]
    found = next((path for path in candidates if path.is_file()), None)
    return found or (Path(which) if (which := shutil.which(name)) else None)
