"""Compiling a model piece by piece: what is between matrix products is fused, the rest stays as it is.

The parts of every decoder layer (norms, attention, gated MLP) are compiled for rows of any length, and layers of one
kind share their code. Attention over a packed row itself is not traced: its kernels are called as they are. Compiled
forms serve packed and padded rows alone; generation, saving and a user's own forwards see the model as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from preftune.errors import ConfigError
from preftune.models.attention import keep_attention_untraced

#: CUDA graphs replay fixed shapes, and every row has another length: the same modes without them.
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs", *_WITHOUT_GRAPHS)
#: Backends that torch and accelerate both know and that take shapes that change.
COMPILE_BACKENDS = ("inductor", "aot_eager", "eager")


class CompiledLayers:
    """Compiled forms of the parts of a model's decoder layers.

    Args:
        model: A transformers model, under PEFT or not.
        backend: A backend of ``torch.compile``, one of :data:`COMPILE_BACKENDS`.
        mode: A mode of ``torch.compile``, one of :data:`COMPILE_MODES`. Modes with CUDA graphs are taken without
            them, with a warning.

    Raises:
        ConfigError: The model does not say which of its modules are layers.
    """

    def __init__(self, model: nn.Module, backend: str, mode: str | None = None) -> None:
        if mode in _WITHOUT_GRAPHS:
            instead = _WITHOUT_GRAPHS[mode]
            warnings.warn(
                f"torch_compile_mode: {mode} -> {instead} (CUDA graphs need rows of one length)",
                UserWarning,
                stacklevel=2,
            )
            mode = instead
        parts = [part for layer in _layers(model) for part in layer.children()]
        if not parts:
            raise ConfigError(
                "this model does not say which of its modules are layers",
                where="torch_compile",
                value=type(model).__name__,
                remedy="leave torch_compile out",
            )
        keep_attention_untraced()
        compile_options: dict[str, Any] = {"dynamic": True, "backend": backend, "mode": mode}
        # As nn.Module.compile does, which cannot be undone.
        self._compiled: list[tuple[nn.Module, Callable[..., Any]]] = [
            (part, torch.compile(part._call_impl, **compile_options)) for part in parts
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use the compiled forms.

        Raises:
            ConfigError: The backend fails, such as for want of a compiler.
        """
        try:
            for part, compiled in self._compiled:
                part._compiled_call_impl = compiled
            yield
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise ConfigError(
                "torch.compile failed",
                where="torch_compile",
                value=str(error).strip().partition("\n")[0],
                remedy="leave torch_compile out, or install what its backend needs (a C++ compiler on the CPU)",
            ) from error
        finally:
            for part, _ in self._compiled:
                part._compiled_call_impl = None


def _layers(model: nn.Module) -> list[nn.Module]:
    # What transformers recomputes one by one is what a model repeats.
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
