"""``preftune advise``: settings with reasons, and what looks risky, before anything is loaded or trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import CommandLine, Resolved, resolve, split_command_line
from preftune.config.coerce import Mismatch, coerce
from preftune.errors import ConfigError, PreftuneError, SetupError

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.advice import Advice, Case, Lengths, Noise
    from preftune.advice.shapes import Shape

VERBS = ("dpo", "orpo", "cpo", "kto")
#: Flags of this verb alone, with their types.
_OWN: dict[str, tuple[Any, Any]] = {
    "verb": (str | None, None),
    "json": (bool, False),
    "write": (str | None, None),
    "out": (str | None, None),
    "machine": (str | None, None),
    "num_parameters": (float | None, None),
    "num_pairs": (int | None, None),
    "noise": (float | None, None),
    "audit": (str | None, None),
}
#: Rows that are tokenised to know their lengths; more would not change what is advised.
_SAMPLE_ROWS = 2000
#: Settings of a run that an advice looks at.
_GIVEN = (
    "beta",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "label_smoothing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "max_length",
    "max_tokens_per_row",
    "eval_strategy",
    "save_strategy",
    "optim",
    "bf16",
    "fp16",
)

_HELP = """usage: preftune advise [--config FILE.yaml ...] [--name value ...] [--json] [--write OUT.yaml]

Advise on a run: beta, learning rate, epochs, label smoothing, batch, warm-up and max_length, each with range, reason
and sources; risks of the settings as they are; memory and time. Nothing is trained; of a model, only config.json and
the tokenizer are read.

  --verb            dpo, orpo, cpo, kto
      Which training; found from loss_type and the other settings by default.
  --json            print JSON, as in advice.json
  --write           a file
      Write the advised configuration, with the reasons as comments.
  --out             a folder
      Write advice.json into it.
  --machine         this, cpu, h200, h100-80g, a100-80g, a100-40g, l40s, a10, rtx-4090, rtx-3090  [this]
      Whose memory and speed to reckon with.
  --num_parameters  a number, such as 7e9
      In place of a model that is not at hand.
  --num_pairs       an integer
      In place of data that are not at hand.
  --noise           a number in [0, 0.5]
      Share of flipped labels, in place of an audit.
  --audit           audit.json, or the folder it lies in
      By default that of output_dir, if there is one.

All other settings are those of `preftune dpo`, `orpo`, `cpo` and `kto`."""


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        0.

    Raises:
        PreftuneError: Wrong settings, or data or a model's configuration that cannot be read.
    """
    line = split_command_line(argv)
    if line.help:
        print(_HELP)
        return 0
    own, rest = _own_settings(line)
    from rich.console import Console

    from preftune.cli.failures import plain_warnings

    console = Console(stderr=own["json"])
    with plain_warnings(console):
        verb, rest = _find_verb(own["verb"], rest)
        _run(console, verb, own, rest)
    return 0


def _own_settings(line: CommandLine) -> tuple[dict[str, Any], CommandLine]:
    """Take out the flags that only this verb has."""
    own = {name: default for name, (_, default) in _OWN.items()}
    kept = []
    for name, values, shown in line.flags:
        if name not in own:
            kept.append((name, values, shown))
            continue
        if not values and name != "json":
            raise ConfigError("needs a value", where=shown, remedy=f"write {shown} VALUE")
        try:
            own[name] = coerce(" ".join(values) or "true", _OWN[name][0], text=True)
        except Mismatch as reason:
            raise ConfigError(reason.why, where=shown, value=" ".join(values)) from reason
    for name, least in (("num_parameters", 1), ("num_pairs", 1)):
        if own[name] is not None and own[name] < least:
            raise ConfigError("out of range", where=f"--{name}", value=own[name], allowed=f"{least} or more")
    if own["noise"] is not None and own["audit"] is not None:
        raise ConfigError("both --noise and --audit are given", where="preftune advise", remedy="keep one of them")
    return own, replace(line, flags=tuple(kept))


def _find_verb(asked: str | None, line: CommandLine) -> tuple[str, CommandLine]:
    """The training verb that a configuration is for, from its loss and from settings that only one verb has."""
    from preftune.cli.training import settings_classes
    from preftune.config.fields import fields_of
    from preftune.config.sources import settings_from_file

    written: dict[str, Any] = {}
    for number, path in enumerate(line.configs):
        written |= {setting.name: setting.value for setting in settings_from_file(path, number)}
    written |= {name: values[0] for name, values, _ in line.flags if len(values) == 1}
    loss = written.get("loss_type")
    verb = asked or (_verb_of_loss(str(loss)) if isinstance(loss, str) else None)
    if verb is None:
        known = {each: set(fields_of(settings_classes(each)[0])) for each in VERBS}
        everywhere = set.intersection(*known.values())
        telling = [name for name in written if name not in everywhere and any(name in k for k in known.values())]
        verb = next((each for each in VERBS if all(name in known[each] for name in telling)), "dpo")
    if verb not in VERBS:
        raise ConfigError("nothing is advised for this verb", where="--verb", value=verb, allowed=", ".join(VERBS))
    if verb == "orpo" and loss == "orpo":
        # ORPO has one loss, and no setting for it.
        line = replace(line, flags=tuple(flag for flag in line.flags if flag[0] != "loss_type"))
    return verb, line


def _verb_of_loss(loss: str) -> str | None:
    from preftune.objectives import METHODS

    spec = METHODS.get(loss)
    if spec is None:
        return None
    if not spec.paired:
        return "kto"
    if spec.family == "reference_free":
        return "orpo" if loss == "orpo" else "cpo"
    return "dpo"


# ---- the case ------------------------------------------------------------------------------------------------------


def _run(console: Console, verb: str, own: Mapping[str, Any], line: CommandLine) -> None:
    from preftune.advice import advise
    from preftune.advice.machines import find_machine
    from preftune.cli.training import cli_defaults, complete_pairing, settings_classes
    from preftune.ownership import claim_files

    settings: Resolved[Any] = resolve(
        line, settings_classes(verb)[0], defaults=cli_defaults() | {"on_bad_rows": "warn"}
    )
    complete_pairing(verb, settings)
    notes: list[str] = []
    if own["out"]:
        claim_files(own["out"], "advise", ["advice.json"], "--out")
    with console.status("reading configuration and data"):
        machine = find_machine(own["machine"])
        shape = _shape(settings, own, notes)
        case = _case(verb, settings, own, shape, notes)
        advice = advise(case, shape, machine)
    # A file that cannot be written is said before the table, not below it.
    written = _written(advice, settings, own)
    if own["json"]:
        print(json.dumps(json.loads(_dumped(advice)), indent=2, ensure_ascii=False))
    else:
        from preftune.cli.advise_view import show

        show(console, advice, [*settings.notes, *notes])
    for path in written:
        console.print(f"wrote {path}", markup=False, highlight=False)


def _written(advice: Advice, settings: Resolved[Any], own: Mapping[str, Any]) -> list[str]:
    """Write the files that are asked for."""
    from preftune.advice.advise import write_json

    written = []
    if own["out"]:
        path = Path(own["out"]) / "advice.json"
        try:
            write_json(advice.as_dict(), path)
        except OSError as error:
            raise SetupError(
                f"cannot write into the folder ({error.strerror})", where="--out", value=own["out"]
            ) from error
        written.append(str(path))
    if own["write"]:
        _write(advice, settings, own["write"])
        written.append(own["write"])
    return written


def _dumped(advice: Advice) -> str:
    from preftune.advice.advise import plain

    return json.dumps(plain(advice.as_dict()), allow_nan=False)


def _shape(settings: Resolved[Any], own: Mapping[str, Any], notes: list[str]) -> Shape:
    from preftune.advice.shapes import config_of_size, load_config, shape_of
    from preftune.cli.network import go_offline_if_unreachable
    from preftune.models.loading import peft_config_from

    model, args = settings.model, settings.trainer
    if own["num_parameters"] is not None:
        config, name = config_of_size(own["num_parameters"]), f"a Llama of about {own['num_parameters']:g} parameters"
    else:
        if not model.model_name_or_path:
            raise ConfigError(
                "no model to advise on", remedy="set --model_name_or_path, or --num_parameters 7e9 in its place"
            )
        name = model.model_name_or_path
        offline = go_offline_if_unreachable([name])
        if offline:
            notes.append(offline)
        config = load_config(name, revision=model.model_revision, trust_remote_code=model.trust_remote_code)
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else None
    return shape_of(
        config,
        name=name,
        dtype=model.dtype or "float32",
        lora=peft_config_from(model),
        half=bool(args.bf16 or args.fp16),
        bits=bits,
    )


def _case(verb: str, settings: Resolved[Any], own: Mapping[str, Any], shape: Shape, notes: list[str]) -> Case:
    from preftune.advice import Case

    args = settings.trainer
    methods = tuple(args.build_objective().names)
    num_pairs, lengths = own["num_pairs"], None
    script = settings.script
    if script.dataset_name or script.dataset_mixture or script.dataset_mixer:
        found, lengths = _data(verb, settings, own, notes)
        num_pairs = num_pairs or found
    elif num_pairs is None:
        notes.append("no data are named: batch and steps are advised without their number (--num_pairs)")
    return Case(
        verb,
        methods,
        shape.num_parameters,
        shape.num_trainable < shape.num_parameters // 2,
        num_pairs=num_pairs,
        num_processes=args.world_size,
        lengths=lengths,
        noise=_noise(own, args.output_dir, notes),
        max_positions=shape.max_positions if own["num_parameters"] is None else None,
        given=_given(
            {name: getattr(args, name, None) for name in (*_GIVEN, *_knobs(methods))},
            settings.model.ref_model_name_or_path,
        ),
        explicit=frozenset(name for name, origin in settings.origins.items() if origin.kind != "default"),
    )


def _knobs(methods: Sequence[str]) -> list[str]:
    from preftune.objectives import METHODS

    return [knob for name in methods for knob in METHODS[name].knobs]


def _given(values: Mapping[str, Any], reference: str | None) -> dict[str, Any]:
    given = {name: getattr(value, "value", value) for name, value in values.items()}
    return given | {"ref_model_name_or_path": reference}


def _noise(own: Mapping[str, Any], output_dir: str | None, notes: list[str]) -> Noise | None:
    from preftune.advice import Noise
    from preftune.advice.case import noise_from_audit

    if own["noise"] is not None:
        return Noise(own["noise"], own["noise"], own["noise"], "--noise")
    path = Path(own["audit"] or output_dir or ".").expanduser()
    path = path / "audit.json" if path.is_dir() else path
    if own["audit"] is None and path.name != "audit.json":
        return None
    if own["audit"] is None and not path.is_file():
        return None
    found = noise_from_audit(path)
    notes.append(f"label noise from {path}" if found else f"{path} has no estimate of label noise")
    return found


def _data(verb: str, settings: Resolved[Any], own: Mapping[str, Any], notes: list[str]) -> tuple[int, Lengths | None]:
    """Number of rows, and token lengths of a sample before truncation."""
    from preftune.advice import Lengths
    from preftune.cli.network import go_offline_if_unreachable
    from preftune.cli.training import dataset_names, load_splits
    from preftune.data import prepare
    from preftune.models.loading import load_tokenizer
    from preftune.training.lengths import pair_lengths
    from preftune.training.setup import data_options

    model = settings.model
    offline = go_offline_if_unreachable(dataset_names(settings.script))
    if offline:
        notes.append(offline)
    rows = load_splits(settings, with_test=False)["train"]
    if not hasattr(rows, "__len__"):
        notes.append("streamed data: their number and lengths are not known")
        return 0, None
    if model.model_name_or_path is None and model.tokenizer_name_or_path is None:
        notes.append("without a model or tokenizer lengths are not known, and are guessed from max_length")
        return len(rows), None
    if verb == "kto":
        notes.append("lengths of single answers are not counted, and are guessed from max_length")
        return len(rows), None
    step = max(1, -(-len(rows) // _SAMPLE_ROWS))
    sample = rows.select(range(0, len(rows), step)) if step > 1 else rows
    args = settings.trainer
    options = replace(
        data_options(args, implicit_prompt=args.implicit_prompt),
        max_length=None,
        on_bad_rows="warn",
        quarantine_path=None,
        max_dropped_share=None,
    )
    try:
        tokenizer = load_tokenizer(model)
    except PreftuneError as error:
        notes.append(f"lengths are not known, and are guessed from max_length ({error})")
        return len(rows), None
    prepared, _ = prepare(sample, tokenizer, options, "train")
    found = pair_lengths(prepared)
    if found is None or not len(found.row):
        return len(rows), None
    prompts = found.row - found.completion
    sides = found.sequences - found.prompt[:, None]
    # Two prompts are only kept apart where truncation cut them, which it did not.
    counted = f"a sample of {len(found.row):,} of {len(rows):,} pairs" if step > 1 else "counted"
    return len(rows), Lengths(prompts, sides[:, 0], found.completion - sides[:, 0], counted)


def _write(advice: Advice, settings: Resolved[Any], path: str) -> None:
    from preftune.advice.yaml_file import configuration, write_configuration

    kept: dict[str, Any] = {}
    for name, origin in settings.origins.items():
        if origin.kind == "default":
            continue
        for holder in (settings.script, settings.model, settings.trainer):
            if hasattr(holder, name):
                value = getattr(holder, name)
                kept[name] = getattr(value, "value", value)
                break
    write_configuration(configuration(advice, kept), path)


# ---- at the head of a training -------------------------------------------------------------------------------------


def show_at_start(this: Any, trainer: Any, plan: Any) -> None:
    """Print at most a few lines of warnings before a training, and leave ``advice.json``; never in its way.

    Args:
        this: The :class:`~preftune.cli.training.Run`.
        trainer: Its trainer.
        plan: What it is going to do.
    """
    if not this.settings.script.advice:
        return
    if this.verb not in VERBS:
        if this.settings.origins["advice"].kind != "default":
            this.console.print(f"nothing is advised for {this.verb}", style="dim", highlight=False)
        return
    from preftune.advice.advise import write_json
    from preftune.ownership import may_put

    try:
        advice = _advice_at_start(this, trainer, plan)
        for line in advice.lines():
            this.console.print(f"! {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        path = Path(this.args.output_dir) / "advice.json"
        if not this.settings.script.dry_run and trainer.is_world_process_zero() and may_put(path):
            write_json(advice.as_dict(), path)
    except Exception as error:
        # An advice is no reason for a run to fail, whatever is wrong with it.
        said = " ".join(str(error).split())[:200]
        this.console.print(f"no advice ({type(error).__name__}: {said})", style="dim", markup=False, highlight=False)


def _advice_at_start(this: Any, trainer: Any, plan: Any) -> Advice:
    from preftune.advice import Case, advise

    snapshot = this.snapshot["trainer"]
    report = plan.data.get("train")
    kept = getattr(report, "rows_kept", 0)
    path = os.path.join(this.args.output_dir, "audit.json")
    noise = _noise({"noise": None, "audit": path}, None, []) if os.path.isfile(path) else None
    case = Case(
        this.verb,
        tuple(trainer.objective.names),
        plan.num_parameters,
        plan.num_trainable_parameters < plan.num_parameters // 2,
        num_pairs=plan.num_pairs or None,
        num_processes=this.args.world_size,
        noise=noise,
        truncated_share=getattr(report, "num_truncated", 0) / kept if kept else None,
        given=_given({name: snapshot.get(name) for name in (*_GIVEN, *_knobs(trainer.objective.names))}, None),
        explicit=frozenset(name for name, origin in this.settings.origins.items() if origin.kind != "default"),
    )
    parts = {name: getattr(plan.memory, name) for name in ("weights", "gradients", "optimizer", "activations", "head")}
    return advise(case, memory={**parts, "total": plan.memory.total, "available": plan.memory.available})
