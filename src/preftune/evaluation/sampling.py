"""Seeded samples and the log-probs of given completions; training draws with the same code, which lies below both."""

from preftune.models.sampling import (
    TAIL_LEVEL,
    Sample,
    Tokens,
    completion_logps,
    continue_prompts,
    has_left,
    log_ratios,
    sample_completions,
    summed_ratios,
    tail_probabilities,
    tail_shares,
)

__all__ = [
    "TAIL_LEVEL",
    "Sample",
    "Tokens",
    "completion_logps",
    "continue_prompts",
    "has_left",
    "log_ratios",
    "sample_completions",
    "summed_ratios",
    "tail_probabilities",
    "tail_shares",
]
