"""One export from beginning to end: find, load, score, merge, round, write, convert, and say what was lost."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from preftune.config import ModelConfig, redact
from preftune.errors import ConfigError, PreftuneError, SetupError
from preftune.export import gguf as converter
from preftune.export import serve
from preftune.export.held_out_pairs import held_out
from preftune.export.losses import Losses, Stage, of_gguf
from preftune.export.merging import DTYPES, RECORD, check_target, load_for_merge, merge, new_folder, rounded, save
from preftune.files import replace_text
from preftune.models.tuned import Tuned, find_tuned, load_reference

Say = Callable[[str], None]


@dataclass
class ExportOptions:
    """Settings of an export.

    Attributes:
        run: Output folder of a run, a checkpoint, a sweep's folder, or any folder with weights or an adapter.
        output_dir: Where to write; by default ``export`` inside the run's folder.
        base_model: Base model, in place of the one that the run names.
        dtype: Type of the saved weights; by default the base model's own.
        qlora_base: What an adapter of a quantised base is merged into: ``dequantized`` or ``original``.
        gguf: Type of a GGUF file; ``None`` writes none.
        llama_cpp: Folder of llama.cpp, or its converter.
        dataset_name: Held-out pairs, in place of those that the run held out.
        split: Split of `dataset_name`.
        num_pairs: Most pairs to score before and after; 0 scores nothing.
        system: System message for the Modelfile.
        trust_remote_code: Run Python code that comes with the base model.
        overwrite: Replace an earlier export.
        seed: Of the choice of pairs and of the intervals.
    """

    run: str
    output_dir: str | None = None
    base_model: str | None = None
    dtype: str | None = None
    qlora_base: str = "dequantized"
    gguf: str | None = None
    llama_cpp: str | None = None
    dataset_name: str | None = None
    split: str | None = None
    num_pairs: int = 100
    system: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ConfigError: Naming the setting.
        """
        for name, value, choices in (
            ("--dtype", self.dtype, (None, *DTYPES)),
            ("--qlora_base", self.qlora_base, ("dequantized", "original")),
        ):
            if value not in choices:
                allowed = ", ".join(choice for choice in choices if choice)
                raise ConfigError("not an allowed value", where=name, value=value, allowed=allowed)
        for name, number in (("--num_pairs", self.num_pairs), ("--seed", self.seed)):
            if number < 0:
                raise ConfigError("out of range", where=name, value=number, allowed="0 or more")
        if self.split is not None and self.dataset_name is None:
            raise ConfigError("has no effect alone", where="--split", value=self.split, remedy="add --dataset_name")
        if self.gguf is not None:
            self.gguf = converter.check_type(self.gguf)
        elif self.llama_cpp is not None:
            raise ConfigError(
                "has no effect without a GGUF file", where="--llama_cpp", value=self.llama_cpp, remedy="add --gguf q8_0"
            )


@dataclass
class Export:
    """What an export made.

    Attributes:
        folder: The exported folder.
        dtype: Type of its weights.
        base: What was tuned.
        verb: The training verb.
        gguf: The GGUF file, or ``None``.
        stages: Scores of each form of the model.
        num_pairs: Pairs that were scored.
        reward: What accuracy counts: ``rewards``, or ``log-probs per token`` without a reference.
        commands: ``(program, command)`` to serve it with.
        notes: What the user should know.
    """

    folder: Path
    dtype: str
    base: str | None
    verb: str = "dpo"
    gguf: Path | None = None
    stages: list[Stage] = field(default_factory=list)
    num_pairs: int = 0
    reward: str = "rewards"
    commands: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export(options: ExportOptions, say: Say = lambda text: None) -> Export:
    """Export a run.

    Args:
        options: Settings.
        say: Gets a line before each part that takes time.

    Returns:
        What was made; ``export.json`` in its folder says the same.

    Raises:
        PreftuneError: A foreseen failure. An export that is there already stays as it is. If only the GGUF file cannot
            be made, the rest is written before the error.
    """
    tuned = find_tuned(options.run, base=options.base_model)
    if options.qlora_base == "original" and not tuned.quantised:
        raise ConfigError("the base was not quantised in training", where="--qlora_base", value="original")
    if options.system is not None and '"""' in options.system:
        raise ConfigError("a Modelfile cannot hold three quotes in a row", where="--system", value=options.system)
    target = Path(options.output_dir).expanduser() if options.output_dir else tuned.folder / "export"
    check_target(target, overwrite=options.overwrite)
    tools = converter.find_tools(options.llama_cpp) if options.gguf else None
    say(f"loading {tuned.folder}")
    work = _Work(options, tuned, say)
    with new_folder(target, overwrite=options.overwrite) as folder:
        done = work.write(folder, target)
        _finish(done, folder, work.tokenizer, options)
    problem: SetupError | None = None
    if options.gguf is not None and tools is not None:
        say(f"converting to GGUF ({options.gguf})")
        try:
            done.gguf = converter.convert(target, options.gguf, done.dtype, tools)
        except SetupError as error:
            problem = error
        else:
            work.score_gguf(done)
        _finish(done, target, work.tokenizer, options)
    if problem is not None:
        raise SetupError(
            f"{problem.what}; everything else is in {target}",
            where=problem.where,
            value=problem.value,
            remedy=problem.remedy,
        ) from problem
    return done


class _Work:
    """The models of one export, one after the other in memory."""

    def __init__(self, options: ExportOptions, tuned: Tuned, say: Say) -> None:
        self.options, self.tuned, self.say = options, tuned, say
        loaded = load_for_merge(tuned, qlora_base=options.qlora_base, trust_remote_code=options.trust_remote_code)
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.notes: list[str] = []
        pairs = held_out(
            tuned,
            self.tokenizer,
            dataset=options.dataset_name,
            split=options.split,
            num_pairs=options.num_pairs,
            seed=options.seed,
        )
        self.losses: Losses | None = None
        if isinstance(pairs, str):
            self.notes.append(pairs)
        else:
            beta = tuned.setting("trainer", "beta", 0.1)
            self.losses = Losses(
                pairs, pad_token_id=self.tokenizer.pad_token_id or 0, beta=beta or 0.1, seed=options.seed
            )

    def write(self, folder: Path, target: Path) -> Export:
        """Score, merge, round and save."""
        from preftune.training.tasks import TASKS

        options, tuned = self.options, self.tuned
        dtype = options.dtype or _own_dtype(self.model, tuned)
        # Records of other programs and versions may name another.
        verb = tuned.verb if tuned.verb in TASKS else "dpo"
        done = Export(target, dtype, tuned.base, verb, notes=self.notes)
        if self.losses is not None:
            done.num_pairs = len(self.losses.pairs.pairs)
            self.say(f"scoring {done.num_pairs} held-out pairs")
            self._reference()
            if tuned.setting("trainer", "bf16"):
                what = "preftune eval computes in bf16, as the run did, which may rank close pairs otherwise"
                self.notes.append(f"scored in float32; {what}")
            self.losses.add("adapter" if tuned.is_adapter else "trained", self.model)
        if tuned.is_adapter:
            self.say("merging the adapter")
            self.model = merge(self.model)
            if self.losses is not None and (dtype != "float32"):
                self.losses.add("merged, float32", self.model)
        self.say(f"writing {dtype} weights")
        save(rounded(self.model, dtype), self.tokenizer, folder)
        self._forget()
        # Loaded again, as others will: that a folder can be written does not mean that it can be read.
        again = _load_plain(folder, dtype, options.trust_remote_code)
        if self.losses is not None:
            self.losses.add(f"saved, {dtype}", again)
            done.stages = self.losses.stages
            done.reward = "rewards" if self.losses.has_reference else "log-probs per token"
        return done

    def score_gguf(self, done: Export) -> None:
        """Score the GGUF file, if it can be read back."""
        assert done.gguf is not None
        if self.losses is None:
            return
        found = of_gguf(done.folder, done.gguf.name)
        if isinstance(found, str):
            done.notes.append(found)
            return
        self.losses.add(f"GGUF, {self.options.gguf}", found)
        done.notes.append(
            "the GGUF file's weights are scored in transformers, dequantised; llama.cpp also rounds activations"
        )

    def _reference(self) -> None:
        assert self.losses is not None
        if self.tuned.is_adapter and self.tuned.reference is None:
            self.losses.reference(self.model, adapter_off=True)
            self.notes += self.tuned.notes
            return
        if self.tuned.base is None:
            self.notes.append("the run does not name its base model: accuracy is that of log-probs per token")
            return
        try:
            how = ModelConfig(dtype="float32", trust_remote_code=self.options.trust_remote_code)
            base = load_reference(self.tuned, how).model
        except PreftuneError as error:
            self.notes.append(f"no base model, so accuracy is that of log-probs per token ({error.what})")
            return
        self.losses.reference(base)

    def _forget(self) -> None:
        self.model = None
        gc.collect()


def _own_dtype(model: Any, tuned: Tuned) -> str:
    """The type of the base model's files: saving more digits than it has would only cost room."""
    from transformers import AutoConfig

    names = [*([] if tuned.is_adapter else [str(tuned.folder)]), *([tuned.base] if tuned.base else [])]
    for name in names:
        try:
            found = getattr(AutoConfig.from_pretrained(name), "dtype", None)
        except (OSError, ValueError):
            continue
        text = str(found).rpartition(".")[2]
        if text in DTYPES:
            return text
    return "float32"


def _load_plain(folder: Path, dtype: str, trust_remote_code: bool) -> Any:
    from preftune.models.loading import load_model_and_tokenizer

    how = ModelConfig(model_name_or_path=str(folder), dtype=dtype, trust_remote_code=trust_remote_code)
    return load_model_and_tokenizer(how, with_reference=False).model.eval()


def _finish(done: Export, folder: Path, tokenizer: Any, options: ExportOptions) -> None:
    """Write what depends on what was made: Modelfile, card and record."""
    from preftune.training import card

    weights = f"./{done.gguf.name}" if done.gguf is not None else "."
    text, problem = serve.modelfile(tokenizer, weights, system=options.system)
    replace_text(folder / serve.MODELFILE, text)
    if problem is not None and not any(problem in note for note in done.notes):
        done.notes.append(f"the Modelfile has no template: {problem}")
    has_template = (folder / serve.TEMPLATE_FILE).is_file()
    done.commands = serve.commands(done.folder, done.dtype, done.gguf, has_template=has_template)
    record = {
        "format": 1,
        "base_model": done.base,
        "dtype": done.dtype,
        "gguf": done.gguf.name if done.gguf else None,
        "num_pairs": done.num_pairs,
        "accuracy_of": done.reward,
        "scores": [asdict(stage) for stage in done.stages],
        "notes": done.notes,
        "commands": dict(done.commands),
        "settings": {name: redact(value, name) for name, value in asdict(options).items()},
    }
    replace_text(folder / RECORD, json.dumps(_plain(record), indent=2, ensure_ascii=False) + "\n")
    made = card.Card(
        title=serve.served_name(done.folder),
        verb=done.verb,
        # Where it is on somebody's disk is nobody else's business.
        base_model=(Path(done.base).name if Path(done.base).exists() else done.base) if done.base else "a model",
        has_provenance=False,
    )
    card.write(folder, made)


def _plain(value: Any) -> Any:
    """JSON knows no NaN, which an interval of a single prompt has."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
