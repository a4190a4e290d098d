"""Gradients are exchanged once a step, however many rows a process runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from preftune.runs.launcher import launch
from tests.parity import worlds

#: Counts the buckets that DDP exchanges, and trains a case.
_PROGRAM = """
import json, os, sys
from pathlib import Path
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from tests.distributed import cases

buckets = []
begin = DistributedDataParallel.__init__

def begun(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    self.register_comm_hook(None, lambda state, bucket: (buckets.append(0), allreduce_hook(state, bucket))[1])

DistributedDataParallel.__init__ = begun
case, path, out = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
trainer = cases.trained(case, path, out)
found = {"steps": trainer.state.global_step, "rows": trainer.step.max_tokens_per_row, "buckets": len(buckets)}
Path(out, f"exchanged-{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"loss_type": ["bco_pair"]}, {"gradient_accumulation_steps": 3}])
def test_gradients_are_exchanged_once_a_step(more: dict[str, object], tmp_path: Path) -> None:
    world = worlds.World(tmp_path / "world")
    found = []
    for tokens in (4096, 40):
        settings = {"reference_store": False, "num_train_epochs": 1, "max_tokens_per_row": tokens, **more}
        out = tmp_path / str(tokens)
        case = json.dumps(("DPO", 24, settings))
        assert launch(2, [sys.executable, "-c", _PROGRAM, case, world.path, str(out)], print) == 0
        found += [json.loads((out / f"exchanged-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
        steps = 24 / 4 / int(str(more.get("gradient_accumulation_steps", 1)))
        assert [each["steps"] for each in found] == [steps] * len(found)
    assert [each["rows"] for each in found] == [4096, 4096, 40, 40]
    # Each process runs several rows of 40 tokens, and one of 4096.
    assert len({each["buckets"] for each in found}) == 1
