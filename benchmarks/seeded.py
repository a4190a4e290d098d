"""What the experiments over seeds share: cells that are kept one by one, paired differences, and a rule for words.

An experiment is a set of cells, each with a key (a method, a level, a seed). A cell goes into a file beside the result
as soon as it is measured; with ``--go_on`` a run that was cut short keeps the cells that the same code measured with
the same settings. When all are there the file takes the result's place, so that the result of before stays until then.
Where code has changed that does not bear on a finished result, ``--renew 3`` measures three of its cells again, spread
over the file: if all come out to the digit, the result is that of the code as it is now, and says so.

The rule for words, stated before anything is measured: a contender is *better* or *worse* than another where the mean
over seeds of their paired difference is told from 0 by Student's t test at 5 %, after Holm's correction over all
comparisons of the page, on at least :data:`LEAST_SEEDS` seeds. Otherwise *no difference can be told*, and the interval
says how large one may be.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import stale
from preftune.errors import ConfigError
from preftune.stats.intervals import wilson_interval
from preftune.stats.significance import holm

#: Seeds below which nothing is concluded.
LEAST_SEEDS = 8
LEVEL = 0.05

Cell = dict[str, Any]


@dataclass
class Renewal:
    """How many cells of a finished result are to be measured again; 0 measures what is missing instead."""

    number: int = 0


#: What ``--renew`` asks for: of the whole process, like a log level.
renewal = Renewal()


def processor_seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Cells:
    """The cells of an experiment.

    Args:
        out: The result file.
        head: What is the same for all cells: settings, machine, and so on.
        patterns: Files that the figures depend on; see :func:`benchmarks.stale.stamp`.
        keys: Names of what tells cells apart.
        go_on: Keep what a run that was cut short has measured, or else a finished one to which cells are added.

    Raises:
        ConfigError: That run was with other code or settings.
    """

    def __init__(
        self, out: Path, head: Mapping[str, Any], patterns: Sequence[str], keys: Sequence[str], go_on: bool
    ) -> None:
        self.out, self.keys = out, tuple(keys)
        self.part = out.with_suffix(".part")
        self.report: dict[str, Any] = {**head, stale.KEY: stale.stamp(*patterns), "cells": []}
        self._started = processor_seconds()
        #: Cells that have to come out as they did.
        self._expected: list[Cell] = []
        self._order: dict[str, int] = {}
        if renewal.number:
            self._renew(renewal.number)
            return
        kept = self.part if self.part.is_file() else out
        if go_on and kept.is_file():
            old = json.loads(kept.read_text(encoding="utf-8"))
            same = old.get(stale.KEY, {}).get("digest") == self.report[stale.KEY]["digest"]
            same = same and all(_plain(old.get(name)) == _plain(head[name]) for name in head if name != "machine")
            if same:
                self.report = old
            elif kept == self.part:
                raise ConfigError(
                    "the cells were measured with other code or settings",
                    where="--go_on",
                    value=str(self.part),
                    remedy="leave --go_on out to begin anew",
                )

    def _renew(self, number: int) -> None:
        """Take a finished result, but for some cells of it."""
        old = json.loads(self.out.read_text(encoding="utf-8"))
        new = {name: value for name, value in self.report.items() if name not in ("machine", "cells")}
        for name, value in new.items():
            if name != stale.KEY and _plain(old.get(name)) != _plain(value):
                raise ConfigError("the result was measured with other settings", where="--renew", value=name)
        cells = old["cells"]
        self._order = {self._key(cell): place for place, cell in enumerate(cells)}
        places = _first_of_a_seed(cells, number)
        self._expected = [cells[place] for place in sorted(places)]
        kept = [cell for place, cell in enumerate(cells) if place not in places]
        stamp = {**self.report[stale.KEY], "date": old[stale.KEY]["date"]}
        renewed = {"date": self.report[stale.KEY]["date"], "cells": len(places)}
        self.report = {**old, stale.KEY: stamp, "renewed": renewed, "cells": kept}

    def has(self, **key: Any) -> bool:
        """Whether a cell has been measured."""
        return any(all(cell[name] == key[name] for name in self.keys) for cell in self.report["cells"])

    def start(self) -> None:
        """What is spent from here on belongs to the next cell."""
        self._started = processor_seconds()

    def enter(self, cell: Cell) -> None:
        """Keep a cell, with the processor time since :meth:`start` or the last cell."""
        cell["processor_seconds"] = round(processor_seconds() - self._started, 1)
        if self._expected:
            cell = self._as_before(cell)
        self.report["cells"].append(cell)
        self.save()
        self.start()

    def _key(self, cell: Cell) -> str:
        return json.dumps(_plain([cell[name] for name in self.keys]))

    def _as_before(self, cell: Cell) -> Cell:
        before = next(old for old in self._expected if self._key(old) == self._key(cell))
        if _figures(before) != _figures(cell):
            self.part.unlink(missing_ok=True)
            raise ConfigError(
                "a cell does not come out as it did, so that all of them have to be measured again",
                where="--renew",
                value={name: cell[name] for name in self.keys},
                remedy="run without --renew",
            )
        return before

    def save(self) -> None:
        """Write what there is, in one step."""
        self.part.parent.mkdir(parents=True, exist_ok=True)
        beside = self.part.with_suffix(".tmp")
        beside.write_text(json.dumps(without_nan(self.report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, self.part)

    def finish(self) -> dict[str, Any]:
        """All cells are there: the file takes the result's place."""
        self.report["cells"].sort(key=lambda cell: self._order.get(self._key(cell), len(self._order)))
        self.save()
        os.replace(self.part, self.out)
        return self.report


def _first_of_a_seed(cells: Sequence[Cell], number: int) -> set[int]:
    """Places of the first cells of the seed in the middle, and of the seeds after it where it has fewer.

    Cells of a seed share the reference's log-probs, which have the rounding of the rows of the first of them, so that
    a cell from further on would come out otherwise in the last digit.
    """
    seeds = list(dict.fromkeys(cell.get("seed") for cell in cells))
    middle = len(seeds) // 2
    ordered = [
        place
        for seed in seeds[middle:] + seeds[:middle]
        for place, cell in enumerate(cells)
        if cell.get("seed") == seed
    ]
    return set(ordered[:number])


def _figures(cell: Cell) -> Any:
    """What is the same for the same code and seed: all but times."""
    return _plain({name: value for name, value in cell.items() if "seconds" not in name})


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(without_nan(value)))


def without_nan(value: Any) -> Any:
    """For JSON: what is not finite is null."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def arguments(parser: argparse.ArgumentParser, out: Path, document: Path) -> None:
    """The options that all experiments have."""
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=out, help="result file")
    parser.add_argument("--document", type=Path, default=document, help="page that is written from it")
    parser.add_argument("--go_on", action="store_true", help="keep the cells of a run that was cut short")
    parser.add_argument("--renew", type=_renews, metavar="N", help="measure N cells of a finished result again")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the page from the file")


def _renews(text: str) -> int:
    renewal.number = int(text)
    return renewal.number


def spent(report: Mapping[str, Any]) -> str:
    """What the cells took, for a page: number, and processor time of one and of all."""
    times = [cell["processor_seconds"] for cell in report["cells"] if cell.get("processor_seconds") is not None]
    if not times:
        return ""
    again = report.get("renewed")
    renewed = f" {again['cells']} of them came out to the digit once more on {again['date']}." if again else ""
    return (
        f"{len(report['cells'])} cells, {float(np.median(times)):.0f} s of one core in the median, "
        f"{sum(times) / 3600:.1f} hours in all. Measured {report[stale.KEY]['date']}.{renewed}"
    )


# ---- comparisons over seeds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A paired difference over seeds.

    Attributes:
        name: What is compared.
        mean: Mean over seeds.
        low: Lower end of Student's 95 % interval.
        high: Upper end.
        p: Of the t test.
        num: Seeds.
        num_above: Seeds on which the first is above.
    """

    name: str
    mean: float
    low: float
    high: float
    p: float
    num: int
    num_above: int

    def text(self, digits: int = 3) -> str:
        """``mean [low, high]``, with signs."""
        if not math.isfinite(self.low):
            return f"{self.mean:+.{digits}f}"
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def difference(name: str, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Ours minus theirs on the seeds that both have; the values are one per seed."""
    gaps = np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    num, mean = len(gaps), float(gaps.mean()) if len(gaps) else math.nan
    above = int((gaps > 0).sum())
    if num < 2:
        return Difference(name, mean, math.nan, math.nan, 1.0, num, above)
    error = float(gaps.std(ddof=1)) / math.sqrt(num)
    if error == 0:
        return Difference(name, mean, mean, mean, 1.0 if mean == 0 else 0.0, num, above)
    reach = float(stats.t.ppf(0.975, num - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, num - 1))
    return Difference(name, mean, mean - reach, mean + reach, p, num, above)


def verdicts(found: Sequence[Difference]) -> list[str]:
    """``better``, ``worse`` or ``no difference can be told`` of each, by the rule of this module."""
    adjusted = holm([each.p for each in found]).tolist() if found else []
    words = []
    for each, p in zip(found, adjusted, strict=True):
        if each.num < LEAST_SEEDS:
            words.append(f"nothing is concluded from {each.num} seed{'s' * (each.num != 1)}")
        elif p < LEVEL:
            words.append("better" if each.mean > 0 else "worse")
        else:
            words.append("no difference can be told")
    return words


def share(hits: int, total: int) -> str:
    """A count with the 95 % interval of its share (Wilson): ``0 of 20 (0 to 16 %)``."""
    if total < 2:
        return f"{hits} of {total}"
    found = wilson_interval(hits, total)
    return f"{hits} of {total} ({100 * found.low:.0f} to {100 * found.high:.0f} %)"


def by_seed(cells: Iterable[Cell], value: str = "reward") -> dict[int, float]:
    """Mean of a score of each seed's cell."""
    return {cell["seed"]: float(cell[value]["mean"]) for cell in cells}


def place(document: Path, name: str, text: str) -> None:
    """Put text between the marks of a page, ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Raises:
        ConfigError: The page has no such marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = document.read_text(encoding="utf-8")
    if begin not in page or end not in page:
        raise ConfigError("the page has no place for it", where=str(document), value=begin)
    before, _, rest = page.partition(begin)
    document.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
