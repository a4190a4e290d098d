"""Nested state as one JSON file and one safetensors file: nothing is pickled, every bit comes back.

JSON holds the structure and the numbers; tensors are in the safetensors file under running numbers. Python's floats
are written with the shortest text that reads back as the same number.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from preftune.errors import SetupError, TrainingError
from preftune.training.checkpoints.files import write_json

_KINDS = ("tensor", "tuple", "pairs", "float", "array", "deque", "dtype")


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Write ``name.json`` and, where there are tensors, ``name.safetensors``.

    Args:
        folder: An existing folder.
        name: Name of the files, without ending.
        tree: Mappings, lists, tuples, numbers, text, ``None``, tensors and NumPy arrays, nested at will.

    Raises:
        OSError: If the disk cannot take it.
        TrainingError: If the tree holds something else.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, tensors, {}, name)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    write_json(folder / f"{name}.json", structure)


def load_tree(folder: Path, name: str) -> Any:
    """Read what :func:`save_tree` wrote; tensors come on the CPU.

    Raises:
        SetupError: If a file is missing or damaged.
    """
    path = folder / f"{name}.json"
    try:
        structure = json.loads(path.read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = {}
        beside = folder / f"{name}.safetensors"
        if beside.exists():
            with safe_open(beside, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        return _decode(structure, tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SetupError(f"cannot be read ({error})", where=str(path), remedy="use another checkpoint") from error


def has_tree(folder: Path, name: str) -> bool:
    """Whether :func:`save_tree` has written ``name`` there."""
    return (folder / f"{name}.json").is_file()


def _encode(value: Any, tensors: dict[str, Tensor], seen: dict[Any, str], where: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        return {"tensor": _keep(value, tensors, seen)}
    if isinstance(value, np.ndarray):
        return {"array": _keep(torch.from_numpy(value.view(np.uint8)), tensors, seen), "of": value.dtype.str}
    if isinstance(value, np.generic):
        return _encode(value.item(), tensors, seen, where)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        # As pairs: keys may be numbers, and their order is part of the state.
        return {"pairs": [[k, _encode(v, tensors, seen, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, deque):
        return {"deque": [_encode(v, tensors, seen, where) for v in value], "most": value.maxlen}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, seen, f"{where}[{n}]") for n, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TrainingError(
        "state that is neither numbers, text nor tensors cannot be kept in a checkpoint",
        where=where,
        value=type(value).__name__,
        remedy="use another optimizer or scheduler, or save_only_model: true",
    )


def _keep(tensor: Tensor, tensors: dict[str, Tensor], seen: dict[Any, str]) -> str:
    """Number under which a tensor is written; one that occurs in several places is written once."""
    place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.device)
    if tensor.numel() and place in seen:
        return seen[place]
    name = seen[place] = str(len(tensors))
    plain = tensor.detach().to("cpu").contiguous()
    # Two views of one storage are two tensors to the file.
    whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    tensors[name] = plain if whole else plain.clone()
    return name


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    kind = next((kind for kind in _KINDS if kind in value), None)
    if kind == "tensor":
        return tensors[value["tensor"]].clone()
    if kind == "array":
        return tensors[value["array"]].numpy().view(np.dtype(value["of"])).copy()
    if kind == "pairs":
        return {key: _decode(entry, tensors) for key, entry in value["pairs"]}
    if kind == "tuple":
        return tuple(_decode(entry, tensors) for entry in value["tuple"])
    if kind == "deque":
        return deque((_decode(entry, tensors) for entry in value["deque"]), maxlen=value["most"])
    if kind == "float":
        return float(value["float"])
    if kind == "dtype":
        return getattr(torch, value["dtype"])
    raise ValueError(f"unknown entry {sorted(value)}")
