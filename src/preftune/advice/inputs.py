"""What an advice goes by, gathered from settings, data, a model's configuration and an audit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from preftune.advice.advisor import Advice, advise
from preftune.advice.case import Case, Lengths, Noise, noise_from_audit
from preftune.config import CommandLine, Resolved
from preftune.config.fields import fields_of
from preftune.config.sources import settings_from_file
from preftune.data import prepare
from preftune.data.unpaired import prepare_unpaired
from preftune.errors import ConfigError, PreftuneError
from preftune.models.loading import load_tokenizer, peft_config_from
from preftune.models.shapes import Shape, config_of_size, load_config, shape_of
from preftune.objectives import METHODS
from preftune.runs.data import dataset_names, load_splits
from preftune.runs.network import go_offline_if_unreachable
from preftune.runs.run import Run
from preftune.runs.settings import settings_classes
from preftune.training.lengths import pair_lengths
from preftune.training.machines import find_machine
from preftune.training.setup import data_options
from preftune.verbs import PREFERENCE_VERBS, ROWS

#: Rows that are tokenised to know their lengths; more would not change what is advised.
_SAMPLE_ROWS = 2000
#: Verbs that there is an advice for.
VERBS = PREFERENCE_VERBS
#: Settings of a run that an advice looks at.
_GIVEN = (
    *("max_prompt_length", "truncation_mode"),
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
    "gradient_checkpointing",
    "checkpoint_policy",
    "activation_offloading",
    "generation_steps",
    "reference_store",
    "sync_ref_model",
    "fsdp",
    "deepspeed",
    "f_divergence_type",
    "f_alpha_divergence_coef",
)
#: Settings of the model that it looks at.
_OF_MODEL = ("dtype", "load_in_4bit", "load_in_8bit", "lora_r", "lora_alpha", "lora_target_modules")


@dataclass
class Known:
    """What is told instead of being looked up.

    Attributes:
        machine: Whose memory and speed to reckon with.
        num_parameters: In place of a model that is not at hand.
        num_pairs: In place of data that are not at hand.
        noise: Share of flipped labels, in place of an audit.
        audit: An ``audit.json``, or its folder.
        has_test: Whether the data have a test split; found with them.
    """

    machine: str | None = None
    num_parameters: float | None = None
    num_pairs: int | None = None
    noise: float | None = None
    audit: str | None = None
    has_test: bool | None = None


def find_verb(line: CommandLine) -> str:
    """The training verb that a configuration is for, from its loss and from settings that only one verb has.

    Raises:
        ConfigError: A configuration file cannot be read.
    """
    written = {
        each.name: each.value for number, path in enumerate(line.configs) for each in settings_from_file(path, number)
    }
    written |= {name: values[0] for name, values, _ in line.flags if len(values) == 1}
    loss = written.get("loss_type")
    spec = METHODS.get(loss) if isinstance(loss, str) else None
    if spec is not None:
        if not spec.paired:
            return next(each for each in VERBS if ROWS[each] == "labelled")
        return ("orpo" if loss == "orpo" else "cpo") if spec.family == "reference_free" else "dpo"
    known: dict[str, set[str]] = {each: set(fields_of(settings_classes(each)[0])) for each in VERBS}
    telling = set(written) & set().union(*known.values()) - set[str].intersection(*known.values())
    return next((each for each in VERBS if telling <= known[each]), "dpo")


def advise_on(verb: str, settings: Resolved[Any], known: Known) -> tuple[Advice, list[str]]:
    """Advise on a run before it exists.

    Args:
        verb: Its verb.
        settings: Its settings.
        known: What is told.

    Returns:
        The advice, and notes on what it goes by.

    Raises:
        PreftuneError: Data or the model's configuration cannot be read.
    """
    notes: list[str] = []
    machine = find_machine(known.machine)
    shape = _shape(settings, known, notes)
    case = _case(verb, settings, known, shape, notes)
    first = advise(case, set_alone=True)
    # What is shown is for the settings as they are advised, the adapter's included.
    adapter = {name: value for name, value in first.values().items() if name in _OF_MODEL}
    if any(value != case.given.get(name) for name, value in adapter.items()):
        shape = _shape(replace(settings, model=replace(settings.model, **adapter)), known, [])
    return advise(case, shape, machine, set_alone=True), notes


def advise_at_start(this: Run, trainer: Any, plan: Any) -> Advice:
    """Advise on a run that is about to start.

    Args:
        this: The run.
        trainer: Its trainer.
        plan: What it is going to do.
    """
    snapshot = this.snapshot["trainer"]
    report = plan.data.get("train")
    kept = getattr(report, "rows_kept", 0)
    path = os.path.join(this.args.output_dir, "audit.json")
    noise = noise_from_audit(Path(path)) if os.path.isfile(path) else None
    case = Case(
        this.verb,
        tuple(trainer.task.objective.names),
        plan.num_parameters,
        plan.num_trainable_parameters < plan.num_parameters // 2,
        num_pairs=plan.num_pairs or None,
        num_processes=this.args.world_size,
        has_test=this.has_test,
        noise=noise,
        truncated_share=getattr(report, "num_truncated", 0) / kept if kept else None,
        given=_given(
            {
                **{name: snapshot.get(name) for name in (*_GIVEN, *_knobs(trainer.task.objective.names))},
                **{name: getattr(this.settings.model, name, None) for name in _OF_MODEL},
            },
            None,
        ),
        explicit=frozenset(name for name, origin in this.settings.origins.items() if origin.kind != "default"),
    )
    return advise(case, memory=plan.memory, time=plan.time)


def _shape(settings: Resolved[Any], known: Known, notes: list[str]) -> Shape:
    model, args = settings.model, settings.trainer
    if known.num_parameters is not None:
        config, name = config_of_size(known.num_parameters), f"a Llama of about {known.num_parameters:g} parameters"
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
        nested=bool(model.use_bnb_nested_quant),
    )


def _case(verb: str, settings: Resolved[Any], known: Known, shape: Shape, notes: list[str]) -> Case:
    args = settings.trainer
    methods = tuple(args.build_objective().names)
    num_pairs, lengths = known.num_pairs, None
    script = settings.script
    if script.dataset_name or script.dataset_mixture or script.dataset_mixer:
        found, lengths = _data(verb, settings, known, notes)
        num_pairs = num_pairs or found
    elif num_pairs is None:
        notes.append("no data are named: batch and steps are advised without their number (--num_pairs)")
    return Case(
        verb,
        methods,
        # A name like 7B is a rounded number, and rules begin at it.
        shape.num_parameters if known.num_parameters is None else round(known.num_parameters),
        shape.num_trainable < shape.num_parameters // 2,
        num_pairs=num_pairs,
        num_processes=args.world_size,
        lengths=lengths,
        noise=_noise(known, args.output_dir, notes),
        max_positions=shape.max_positions if known.num_parameters is None else None,
        given=_given(
            {
                **{name: getattr(args, name, None) for name in (*_GIVEN, *_knobs(methods))},
                **{name: getattr(settings.model, name, None) for name in _OF_MODEL},
            },
            settings.model.ref_model_name_or_path,
        ),
        explicit=frozenset(name for name, origin in settings.origins.items() if origin.kind != "default"),
        has_test=known.has_test,
    )


def _knobs(methods: Sequence[str]) -> list[str]:
    return [knob for name in methods for knob in METHODS[name].knobs]


def _given(values: Mapping[str, Any], reference: str | None) -> dict[str, Any]:
    given = {name: getattr(value, "value", value) for name, value in values.items()}
    return given | {"ref_model_name_or_path": reference}


def _noise(known: Known, output_dir: str | None, notes: list[str]) -> Noise | None:
    if known.noise is not None:
        return Noise(known.noise, known.noise, known.noise, "--noise")
    path = Path(known.audit or output_dir or ".").expanduser()
    path = path / "audit.json" if path.is_dir() else path
    if known.audit is None and path.name != "audit.json":
        return None
    if known.audit is None and not path.is_file():
        return None
    found = noise_from_audit(path)
    notes.append(f"label noise from {path}" if found else f"{path} has no estimate of label noise")
    return found


def _data(verb: str, settings: Resolved[Any], known: Known, notes: list[str]) -> tuple[int, Lengths | None]:
    """Number of rows, and token lengths of a sample before truncation."""
    model = settings.model
    offline = go_offline_if_unreachable(dataset_names(settings.script))
    if offline:
        notes.append(offline)
    splits = load_splits(settings, with_test=None)
    rows, known.has_test = splits["train"], "test" in splits
    if not hasattr(rows, "__len__"):
        notes.append("streamed data: their number and lengths are not known")
        return 0, None
    if model.model_name_or_path is None and model.tokenizer_name_or_path is None:
        notes.append("without a model or tokenizer lengths are not known, and are guessed from max_length")
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
    if ROWS[verb] == "labelled":
        # A pair is two answers, each an example of its own.
        prepared, _ = prepare_unpaired(sample, tokenizer, options, "train")
        share = len(prepared) / max(len(sample), 1)
        found = pair_lengths(prepared)
        if found is None or not len(found.row):
            return len(rows), None
        own = found.sequences[:, 0] - found.prompt
        counted = _counted(len(prepared), round(share * len(rows)), step)
        return round(share * len(rows)), Lengths(found.prompt, own, np.zeros_like(own), counted)
    prepared, _ = prepare(sample, tokenizer, options, "train")
    found = pair_lengths(prepared)
    if found is None or not len(found.row):
        return len(rows), None
    prompts = found.row - found.completion
    sides = found.sequences - found.prompt[:, None]
    # Two prompts are only kept apart where truncation cut them, which it did not.
    counted = _counted(len(found.row), len(rows), step)
    # Rows that training would leave out for want of a scored token are no examples.
    number = len(found.row) if step == 1 else len(rows)
    return number, Lengths(prompts, sides[:, 0], found.completion - sides[:, 0], counted)


def _counted(sample: int, whole: int, step: int) -> str:
    return f"a sample of {sample:,} of {whole:,}" if step > 1 else "counted"
