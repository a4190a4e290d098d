"""The stages of the whole path, each of which is skipped where it is done already."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import Resolved, redact, redact_argv
from preftune.errors import ConfigError, DataError, SetupError, flat
from preftune.files import parse_json
from preftune.ownership import RunFolder, check_places, claim_files
from preftune.pipeline.choices import Asked, Settled, advised_choices, look_at, own_choices, settle, verb_for
from preftune.verbs import PREFERENCE_VERBS, ROWS

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.advice import Advice
    from preftune.data.audit import AuditReport
    from preftune.evaluation import EvalResult

#: Files of this verb in the output folder, and what its record is called.
STATE, SETTINGS, KIND = "run.json", "run.yaml", "run"
#: Settings that say how to run, not what.
_NOT_WRITTEN = ("dry_run", "resume_from_checkpoint", "existing_output")


@dataclass
class Pipeline:
    """One call of `preftune run`.

    Attributes:
        asked: What is to be done.
        argv: Words after the verb, for the command that goes on.
        console: Where notes are printed.
        verb: The training verb.
        settings: Settings as they were given.
        folder: The output folder.
        begun: Whether an earlier call with the same words has settled everything.
        notes: What the advice goes by.
        num_held_out: Rows that are held out, as far as it is known before loading.
    """

    asked: Asked
    argv: tuple[str, ...]
    console: Console
    verb: str = field(init=False)
    settings: Resolved[Any] = field(init=False)
    folder: Path = field(init=False)
    begun: bool = field(default=False, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    num_held_out: int = field(default=0, init=False)

    @property
    def command(self) -> str:
        """The command that goes on where this one stopped: the same one."""
        return shlex.join(redact_argv(["preftune", "run", *self.argv]))

    @property
    def dry(self) -> bool:
        """Whether nothing is to be trained or left behind."""
        return bool(self.settings.script.dry_run)

    def begin(self) -> None:
        """Read the settings, look at the rows, and find out whether the folder is free, or this run's.

        Raises:
            PreftuneError: Settings or data are wrong, or something else is in the folder.
        """
        from preftune.runs.run import Run
        from preftune.runs.settings import read_settings

        self._rows = look_at(self._named())
        self.verb = verb_for(self.asked, self._rows)
        self.settings = read_settings(self.verb, self.asked.line)
        if self.settings.trainer.resume_from_checkpoint:
            raise ConfigError(
                "goes on by itself", where="resume_from_checkpoint", remedy=f"run it again without: {self.command}"
            )
        self.explicit = self._explicit()
        probe = Run(self.verb, self.argv, self.settings, self.console)
        probe.complete()
        self.folder = Path(self.settings.trainer.output_dir)
        # It is part of what is written down, so that nothing depends on how it was found.
        self.explicit.setdefault("output_dir", str(self.folder))
        self._find_earlier()

    def _named(self) -> dict[str, Any]:
        given = self.asked.given()
        if not any(given.get(name) for name in ("dataset_name", "dataset_mixture", "dataset_mixer", "datasets")):
            raise ConfigError(
                "no data to train on", where="command line", remedy="preftune run pairs.jsonl --model MODEL"
            )
        if not given.get("model_name_or_path"):
            raise ConfigError(
                "no model to tune", where="--model", remedy="set --model to a folder or to a name on the Hub"
            )
        return given

    def _explicit(self) -> dict[str, Any]:
        from preftune.runs.settings import explicit

        found = explicit(self.settings)
        return {name: value for name, value in found.items() if name not in _NOT_WRITTEN}

    def _identity(self) -> dict[str, Any]:
        asked = self.asked
        document = {"settings": self.explicit, "audit": asked.audit, "verb": self.verb}
        # As it is kept, so that it can be compared: nothing secret, and nothing that JSON does not know.
        found: dict[str, Any] = json.loads(json.dumps(redact(document), default=str, sort_keys=True))
        return found

    def _find_earlier(self) -> None:
        from preftune.training.checkpoints.output import results_in

        state = self.folder / STATE
        if not state.is_file():
            strange = results_in(self.folder)
            if strange:
                raise ConfigError(
                    f"the folder holds results of another run ({', '.join(strange[:3])})",
                    where="--out",
                    value=str(self.folder),
                    remedy="name another --out",
                )
            return
        try:
            earlier = parse_json(state.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            why = f"cannot be read ({flat(error)[:100]})"
            raise ConfigError(why, where=str(state), remedy="name another --out") from error
        before = earlier.get("asked") if isinstance(earlier, Mapping) else None
        if before != self._identity():
            command = earlier.get("command") if isinstance(earlier, Mapping) else None
            told = f", or go on with the earlier one: {shlex.join(map(str, command))}" if command else ""
            raise ConfigError(
                f"the folder holds a run with other settings ({_difference(before, self._identity())})",
                where="--out",
                value=str(self.folder),
                remedy=f"name another --out{told}",
            )
        self.begun = (self.folder / SETTINGS).is_file()

    # ---- audit and settings -----------------------------------------------------------------------------------------

    def audit(self) -> AuditReport | None:
        """Look the data over; ``None`` where that is not wanted, or done.

        Raises:
            PreftuneError: The data cannot be used.
        """
        from preftune.runs.audit import audit_data

        if not self.asked.audit or self.begun:
            return None
        if not self.dry:
            claim_files(self.folder, "audit", ["audit.json"], "--out")
        report = audit_data(self._held(), self.console)
        if not self.dry:
            report.write(self.folder)
        return report

    def _held(self) -> Resolved[Any]:
        """The given settings, with the rows held out that are going to be."""
        from preftune.runs.settings import read_settings

        chosen = own_choices(self.verb, self._rows, accelerator=_computes_in_bfloat16())
        defaults = {choice.name: choice.value for choice in chosen}
        settings = read_settings(self.verb, self.asked.line, **defaults)
        settings.trainer.output_dir = str(self.folder)
        size = settings.script.test_split_size or 0
        self.num_held_out = round(size if size >= 1 else size * self._rows.num_rows)
        if self.settings.script.allow_drops:
            settings.trainer.max_dropped_share = None
        return settings

    def settle(self) -> tuple[Settled | None, Advice | None]:
        """Decide every setting that was not given; ``None`` where an earlier call has done so.

        Raises:
            PreftuneError: Data or the model's configuration cannot be read.
        """
        if self.begun:
            return None, None
        chosen = own_choices(self.verb, self._rows, accelerator=_computes_in_bfloat16())
        advice = self._advice() if self.verb in PREFERENCE_VERBS else None
        if advice is not None:
            chosen += advised_choices(advice)
        return settle(self.verb, self.explicit, chosen), advice

    def _advice(self) -> Advice:
        from preftune.advice.inputs import Known, advise_on

        settings = self._held()
        # What is left out was said by the audit, and will be by the training.
        settings.trainer.on_bad_rows = settings.script.on_bad_rows = "warn"
        settings.trainer.quarantine_path = settings.script.quarantine_path = None
        advice, self.notes = advise_on(self.verb, settings, Known())
        return advice

    def write(self, settled: Settled, place: Path | None = None) -> Path:
        """Write the settings down, and that they are this call's.

        Args:
            settled: The settings.
            place: A folder for a dry run, which leaves nothing in the output folder.

        Returns:
            The file of the settings.

        Raises:
            ConfigError: Somebody else's files are there.
            SetupError: They cannot be written.
        """
        if place is not None:
            path = place / SETTINGS
            path.write_text(settled.text(), encoding="utf-8")
            return path
        check_places({"--out": str(self.folder)}, {"model_name_or_path": self.settings.model.model_name_or_path})
        try:
            run = claim_files(self.folder, KIND, [STATE, SETTINGS], "--out")
            path = run.put_text(SETTINGS, settled.text())
            self._remember(run)
        except OSError as error:
            why = f"cannot write into the folder ({error.strerror})"
            raise SetupError(why, where="--out", value=str(self.folder), remedy="free some space") from error
        return path

    def _remember(self, run: RunFolder) -> None:
        document = {
            "format": 1,
            "command": redact_argv(["preftune", "run", *self.argv]),
            "asked": self._identity(),
        }
        run.put_text(STATE, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    # ---- training ---------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> bool:
        """Whether the training has come to its end."""
        return (self.folder / "provenance.json").is_file()

    def training(self, settings: Path) -> list[str]:
        """Arguments of the training verb, going on where there is a checkpoint."""
        from preftune.training.checkpoints.folders import list_checkpoints

        argv = ["--config", str(settings), *self.asked.secrets()]
        if self.dry:
            return [*argv, "--dry_run"]
        if self.begun and any(list_checkpoints(self.folder)):
            return [*argv, "--resume_from_checkpoint", "true"]
        return [*argv, "--existing_output", "set_aside_own"] if self.begun else argv

    # ---- evaluation and report --------------------------------------------------------------------------------------

    @property
    def evaluated(self) -> bool:
        """Whether there is an evaluation, of as many and as long answers as are asked for."""
        try:
            found = parse_json((self.folder / "eval" / "eval.json").read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        names = ("num_prompts", "max_new_tokens")
        return all(found.get(name, getattr(self.asked, name)) == getattr(self.asked, name) for name in names)

    def evaluate(self, show: Callable[[EvalResult], None]) -> str | None:
        """Evaluate on the rows that were held out.

        Args:
            show: Called with the result.

        Returns:
            Why there is no evaluation; ``None`` where there is one.

        Raises:
            PreftuneError: The evaluation failed.
        """
        from preftune.evaluation import evaluate
        from preftune.evaluation.files import claim
        from preftune.models.tuned import find_tuned
        from preftune.runs.earlier_run import options_of_run, rows_of_run

        if self.verb == "sft":
            return "an example has no rejected answer to compare with; the held-out loss is in the report"
        tuned = find_tuned(self.folder)
        rows = rows_of_run(tuned)
        if isinstance(rows, str):
            return rows
        out = str(self.folder / "eval")
        claim(out)
        try:
            evaluate(
                str(self.folder),
                rows,
                ref_model=tuned.reference,
                data_options=options_of_run(tuned),
                out=out,
                max_length=tuned.setting("trainer", "max_length"),
                bf16=bool(tuned.setting("trainer", "bf16", False)),
                num_prompts=self.asked.num_prompts,
                max_new_tokens=self.asked.max_new_tokens,
                show_progress=True,
                on_result=show,
            )
        except DataError as error:
            if ROWS[self.verb] == "labelled":
                # Single answers make pairs only where a prompt has a good and a bad one.
                return flat(error)
            raise
        return None

    def report(self) -> Path:
        """Write the page.

        Raises:
            PreftuneError: It cannot be written.
        """
        from preftune.report import build

        claim_files(self.folder, "report", ["report.html"], "--out")
        run = RunFolder.open(self.folder, "report")
        path = build([self.folder], self.folder / "report.html")
        run.note([path.name])
        return path


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    old = before.get("settings") if isinstance(before, Mapping) else None
    if not isinstance(old, Mapping):
        return "not known which"
    new = now["settings"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(names[:4]) or "verb or audit"


def _computes_in_bfloat16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


__all__ = ["KIND", "SETTINGS", "STATE", "Pipeline"]
