"""The supervised term: negative log-likelihood of the chosen completion, alone or inside a mixture."""

from __future__ import annotations

from torch import Tensor

from preftune.objectives.batch import PairLogps
from preftune.objectives.knobs import SFT_AVERAGE
from preftune.objectives.numerics import per_token


def sft(batch: PairLogps, *, beta: float, sft_average: str = "batch_tokens") -> Tensor:
    """Negative log-likelihood of the chosen completion, -log pi(y_w) over a number of tokens.

    With ``batch_tokens`` the divisor is the mean number of scored tokens per pair of the whole step: averaged over the
    step's pairs this is the mean over all its chosen tokens, which is TRL's ``sft``. With ``pair_tokens`` every pair
    is divided by its own count, so that long answers weigh no more than short ones.

    Args:
        batch: Any pairs; the reference plays no part.
        beta: Taken for the sake of the common signature; it has no influence.
        sft_average: ``batch_tokens`` or ``pair_tokens``.

    Returns:
        Losses ``(pairs,)`` in nats per token.

    Raises:
        ConfigError: ``sft_average`` is unknown.

    Source: as a term beside a preference loss in Iterative RPO (arXiv:2404.19733, weight 1, per pair and token), in RPO
    (arXiv:2405.16436: weight 0.005 times beta on the *summed* log-prob; 0.2 on the mean per token in its code) and in
    MPO (arXiv:2411.10442).

    Example:
        >>> import torch
        >>> batch = PairLogps(chosen_logps=torch.tensor([-2.0, -9.0]), rejected_logps=torch.zeros(2),
        ...                   chosen_lengths=torch.tensor([1, 3]), rejected_lengths=torch.tensor([1, 1]))
        >>> sft(batch, beta=0.1).tolist(), sft(batch, beta=0.1).mean().item()  # 11 nats over 4 tokens
        ([1.0, 4.5], 2.75)
        >>> sft(batch, beta=0.1, sft_average="pair_tokens").tolist()
        [2.0, 3.0]
    """
    if SFT_AVERAGE.choice(sft_average) == "pair_tokens":
        return -per_token(batch.sft_logps, batch.sft_tokens)
    return -batch.sft_logps / batch.mean_sft_tokens.clamp(min=1.0)
