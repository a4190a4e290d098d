"""Settings of an evaluation, typed and checked; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from preftune.config.secrets import redact
from preftune.errors import ConfigError
from preftune.evaluation.endpoint import JUDGE, SERVER, Role, checked_variable

#: Whom the judge compares the model with.
OPPONENTS = ("reference", "chosen", "compare")
DEFAULT_BETA = 0.1


@dataclass
class EvalConfig:
    """Settings of ``preftune eval`` and of :func:`preftune.evaluation.evaluate`.

    Attributes:
        model: Model to evaluate: Hub id or folder, adapters included.
        ref_model: Reference; an adapter's base model needs no naming.
        compare: Another checkpoint, for a paired comparison on the same pairs.
        out: Folder for ``eval.json`` and everything that is kept for resuming.
        split: Split to evaluate on, by default the test split where there is one; ``test[:500]`` takes a part.
        source_column: Column that says where a row comes from; found by itself as ``subset``, ``source``, ``category``.
        beta: Factor of the implicit reward, by default the one the model was trained with, or else 0.1.
        reference_free: Rewards without a reference.
        length_normalised: Rewards from mean log-probs per token instead of sums.
        max_length: Longest sequence in tokens.
        truncation_mode: Which end survives ``max_length``: ``keep_start`` or ``keep_end``.
        bf16: Compute in bfloat16 by autocast.
        packing_mode: ``auto``, ``packed`` or ``padded``.
        attention_backend: Attention of the packed path.
        max_tokens_per_row: Row budget; by default what the device likes.
        reference_store: Keep log-probs, so that a second evaluation and an interrupted one do not score again.
        num_prompts: Prompts to sample on; 0 samples nothing.
        samples_per_prompt: Completions per prompt.
        max_new_tokens: Most tokens of a completion.
        generation_batch_size: Completions drawn at once; by default as many as fit into memory.
        sampling_url: OpenAI-compatible endpoint that draws the samples, such as ``http://localhost:8000/v1``; by
            default they are drawn here.
        sampling_model: The evaluated model's name there.
        sampling_ref_model: The reference's name there; without it the reference is sampled here.
        sampling_key_env: Environment variable that holds its key; the key itself is never stored.
        num_bins: Bins of the reliability table.
        level: Nominal coverage of all intervals.
        num_resamples: Bootstrap resamples.
        judge_url: OpenAI-compatible endpoint, such as ``http://localhost:8000/v1``.
        judge_model: Model that judges there.
        judge_key_env: Environment variable that holds its key; the key itself is never stored.
        judge_against: Opponent: ``reference``, ``chosen`` (the data's preferred answer) or ``compare``.
        judge_labels: File of human verdicts on comparisons, such as ``to_label.jsonl`` filled in; the win rate is
            corrected for the judge's errors by them.
        judge_concurrency: Questions in flight at once.
        judge_timeout: Seconds until an answer is given up.
        judge_retries: Further attempts at a question that failed.
        judge_max_tokens: Longest answer of the judge.
        report_to: Trackers that get the numbers.
        seed: Of samples and resampling.
    """

    model: str | None = field(default=None, metadata={"help": "Model to evaluate: Hub id or folder, or an adapter's."})
    ref_model: str | None = field(default=None, metadata={"help": "Reference model; an adapter brings its own."})
    compare: str | None = field(default=None, metadata={"help": "Another checkpoint, compared on the same pairs."})
    out: str | None = field(default=None, metadata={"help": "Folder for the results."})
    split: str | None = field(default=None, metadata={"help": "Split to evaluate on, such as test or test[:500]."})
    source_column: str | None = field(default=None, metadata={"help": "Column that says where a row comes from."})
    beta: float | None = field(default=None, metadata={"help": "Factor of the implicit reward."})
    reference_free: bool = field(default=False, metadata={"help": "Rewards without a reference."})
    length_normalised: bool = field(default=False, metadata={"help": "Rewards from mean log-probs per token."})
    max_length: int | None = field(default=1024, metadata={"help": "Longest sequence in tokens."})
    truncation_mode: str = field(
        default="keep_start", metadata={"help": "Which end survives.", "choices": ("keep_start", "keep_end")}
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16."})
    packing_mode: str = field(
        default="auto", metadata={"help": "How sequences are laid out.", "choices": ("auto", "packed", "padded")}
    )
    attention_backend: str = field(default="auto", metadata={"help": "Attention of the packed path."})
    max_tokens_per_row: int | None = field(default=None, metadata={"help": "Token budget of a packed row."})
    reference_store: bool = field(default=True, metadata={"help": "Keep log-probs for later runs and for resuming."})
    num_prompts: int = field(default=32, metadata={"help": "Prompts to sample on; 0 samples nothing."})
    samples_per_prompt: int = field(default=1, metadata={"help": "Completions per prompt."})
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of a sampled completion."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Completions drawn at once; by default as many as fit."}
    )
    sampling_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint that draws the samples."}
    )
    sampling_model: str | None = field(default=None, metadata={"help": "Name of the model there."})
    sampling_ref_model: str | None = field(
        default=None, metadata={"help": "Name of the reference there; without it the reference is sampled here."}
    )
    sampling_key_env: str | None = field(
        default=None, metadata={"help": "Environment variable with that endpoint's key; the key is never stored."}
    )
    num_bins: int = field(default=10, metadata={"help": "Bins of the reliability table."})
    level: float = field(default=0.95, metadata={"help": "Nominal coverage of the intervals."})
    num_resamples: int = field(default=2000, metadata={"help": "Bootstrap resamples."})
    judge_url: str | None = field(default=None, metadata={"help": "OpenAI-compatible endpoint that judges samples."})
    judge_model: str | None = field(default=None, metadata={"help": "Model that judges there."})
    judge_key_env: str | None = field(
        default=None, metadata={"help": "Environment variable with the endpoint's key; the key is never stored."}
    )
    judge_against: str | None = field(default=None, metadata={"help": "Opponent of the model.", "choices": OPPONENTS})
    judge_labels: str | None = field(
        default=None, metadata={"help": "File of human verdicts, to correct the win rate by; see to_label.jsonl."}
    )
    judge_concurrency: int = field(default=4, metadata={"help": "Questions in flight at once."})
    judge_timeout: float = field(default=60.0, metadata={"help": "Seconds until an answer is given up."})
    judge_retries: int = field(default=5, metadata={"help": "Further attempts at a question that failed."})
    judge_max_tokens: int = field(default=512, metadata={"help": "Longest answer of the judge, in tokens."})
    report_to: list[str] | None = field(default=None, metadata={"help": "Trackers that get the numbers."})
    seed: int = field(default=0, metadata={"help": "Seed of samples and resampling."})

    def __post_init__(self) -> None:
        """Refuse values out of range and settings that would have no effect.

        Raises:
            ConfigError: Naming the field, the value, and what is allowed.
        """
        least = {
            "max_length": 2,
            "max_tokens_per_row": 1,
            "num_prompts": 0,
            "samples_per_prompt": 1,
            "max_new_tokens": 1,
            "generation_batch_size": 1,
            "num_bins": 2,
            "num_resamples": 100,
            "judge_concurrency": 1,
            "judge_retries": 0,
            "judge_max_tokens": 1,
            "seed": 0,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ConfigError("out of range", where=name, value=value, allowed=f"{smallest} or more")
        for name in ("beta", "judge_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError("out of range", where=name, value=value, allowed="above 0")
        if not 0.5 <= self.level < 1:
            raise ConfigError("not a confidence level", where="level", value=self.level, allowed="0.5 up to 1")
        for name, choices in (
            ("truncation_mode", ("keep_start", "keep_end")),
            ("packing_mode", ("auto", "packed", "padded")),
            ("judge_against", (None, *OPPONENTS)),
        ):
            if getattr(self, name) not in choices:
                allowed = ", ".join(str(choice) for choice in choices if choice)
                raise ConfigError("not an allowed value", where=name, value=getattr(self, name), allowed=allowed)
        if self._check_endpoint(JUDGE, ("judge_against", "judge_labels")):
            self._check_opponent()
        self._check_endpoint(SERVER, ("sampling_ref_model",))

    def _check_endpoint(self, role: Role, others: tuple[str, ...]) -> bool:
        """Whether an endpoint is set; its settings have to fit."""
        url, key_env = getattr(self, role.url), getattr(self, role.key_env)
        if key_env is not None:
            checked_variable(key_env, role)
        if url is None:
            for name in (role.model, role.key_env, *others):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"has no effect without {role.who.replace('the', 'a')}",
                        where=name,
                        value=getattr(self, name),
                        remedy=f"set {role.url}",
                    )
            return False
        if not url.startswith(("http://", "https://")):
            raise ConfigError("not an address", where=role.url, value=redact(url), allowed="http://... or https://...")
        if not getattr(self, role.model):
            raise ConfigError("no model named", where=role.model, remedy="set it to the name of the endpoint's model")
        if not self.num_prompts:
            raise ConfigError("there are no samples", where="num_prompts", value=0, remedy="set it to 1 or more")
        return True

    def _check_opponent(self) -> None:
        if self.judge_against == "compare" and self.compare is None:
            raise ConfigError(
                "there is no other checkpoint", where="judge_against", value="compare", remedy="set compare"
            )
