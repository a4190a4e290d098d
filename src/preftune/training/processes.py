"""What the processes of a run tell each other, whichever of them has data and whichever has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from preftune.kernels.device import put
from preftune.training.batch import Batch
from preftune.training.config import PackedConfig
from preftune.training.metrics import MetricSums


class Processes:
    """The processes that train together.

    Args:
        accelerator: Accelerate's, which carries out the exchanges.
        args: Settings of the run.
        sharded: Whether parameters lie in shards, so that all processes have to run the same number of rows.
    """

    def __init__(self, accelerator: Accelerator, args: PackedConfig, *, sharded: bool) -> None:
        self.number = args.world_size
        self.index = args.process_index
        self.device = args.device
        self.sharded = sharded
        self._accelerator = accelerator

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.number == 1:
            return tensor
        reduced = self._accelerator.reduce(tensor.clone(), reduction="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def sums(self, values: list[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.number == 1:
            return values
        result: list[float] = self.reduce(put(values, self.device, torch.float64)).tolist()
        return result

    def all_well(self, well: bool) -> bool:
        """Whether every process is well."""
        return not self.sums([float(not well)])[0]

    def most_rows(self, rows: int) -> int:
        """Rows that every process has to run: sharded models gather parameters in step."""
        if self.number == 1 or not self.sharded:
            return rows
        counts = self._accelerator.gather(torch.tensor([rows], device=self.device))
        return int(counts.max())

    def gathered(self, value: Any) -> list[Any]:
        """What every process has, in their order."""
        if self.number == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([value])
        return found

    def filled(self, batch: Batch) -> Batch:
        """A batch, or where it is empty while another process has examples, one of those to stand in for it."""
        if self.number == 1 or not self.sums([float(not batch.examples)])[0]:
            return batch
        offered = [each for each in self.gathered(batch.examples[0] if batch.examples else None) if each is not None]
        return batch if batch.examples or not offered else Batch(offered[:1], [1], weightless=True)

    def together(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches, and empty ones in the end until every sharded process has gone through its own."""
        if self.number == 1 or not self.sharded:
            yield from batches
            return
        mine = iter(batches)
        while True:
            batch = next(mine, None)
            if self.sums([float(batch is None)])[0] == self.number:
                return
            yield batch or Batch([], [0])

    def added(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array summed over all processes."""
        if self.number == 1:
            return values
        found: npt.NDArray[Any] = self.reduce(put(values, self.device, torch.float64)).cpu().numpy()
        return found

    def merged(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """The mappings of all processes in one."""
        return {key: value for part in self.gathered(values) for key, value in part.items()}

    @contextmanager
    def forwards_in_step(self, model: nn.Module) -> Iterator[None]:
        """Let processes run different numbers of forwards of a model, also of a sharded one.

        A sharded model gathers its parameters from all processes, so each forward is announced, and a process that has
        no more of its own runs along with those of the others.
        """
        if self.number == 1 or not self.sharded:
            yield
            return

        def announce(*_: Any) -> None:
            self.sums([1.0])

        hook = model.register_forward_pre_hook(announce, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        training = model.training
        # Without dropout, whose random numbers are the training's.
        model.eval()
        while self.sums([0.0])[0]:
            with torch.no_grad():
                model(input_ids=token, use_cache=False)
        model.train(training)

    def agree_on_names(self, sums: MetricSums) -> None:
        """Enter the metrics that other processes have, with no weight: sums are exchanged as one tensor."""
        if self.number > 1:
            for names in self.gathered(sorted(sums.state())):
                sums.add(dict.fromkeys(names, (0.0, 0.0)))

    def firsts(self, value: Any) -> Any:
        """What the first process has."""
        if self.number == 1:
            return value
        from accelerate.utils import broadcast_object_list

        several = [value]
        broadcast_object_list(several)
        return several[0]

    def in_order(self, predictions: Sequence[Tensor], places: Sequence[int]) -> npt.NDArray[Any] | None:
        """Predictions of all processes, in the order of the data.

        Args:
            predictions: Those of this process, one tensor per batch; shares may differ in length.
            places: Where in the data the examples stand that they are of.

        Returns:
            One array, or ``None`` where nothing was predicted.
        """
        mine = (np.concatenate([each.cpu().numpy() for each in predictions]), places) if predictions else None
        parts = [part for part in self.gathered(mine) if part is not None]
        if not parts:
            return None
        order = np.argsort(np.concatenate([np.asarray(part[1]) for part in parts]))
        joined: npt.NDArray[Any] = np.concatenate([part[0] for part in parts])[order]
        return joined
