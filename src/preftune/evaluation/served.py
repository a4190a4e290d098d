"""Samples from a model that a server of the OpenAI kind holds: vLLM, llama.cpp and others.

The server draws with random numbers of its own. What it draws is scored by the model that is evaluated, so that KL,
tails and lengths are those of its samples; where the server tells its log-probs too, they are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from preftune.evaluation.endpoint import SERVER, Endpoint
from preftune.evaluation.generations import GenerationCache, sample_items
from preftune.evaluation.pairs import Ids
from preftune.evaluation.questions import Questions
from preftune.evaluation.sampling import Sample
from preftune.evaluation.scoring import Scorer
from preftune.models.sampling import end_tokens

#: Mean difference in log-prob per token, in nats, that arithmetic of 16 or 8 bits does not make.
_SAME_WEIGHTS = 0.1


class Server:
    """A server's model.

    Args:
        url: Base address such as ``http://localhost:8000/v1``.
        model: Name of the model there.
        key: Secret for the ``Authorization`` header, or ``None``.
        concurrency: Requests in flight at once.
        timeout: Seconds until an answer is given up.
        retries: Further attempts at a request that failed.
        show_progress: Draw a progress bar.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 5,
        show_progress: bool = False,
    ) -> None:
        self.model = model
        endpoint = Endpoint(url, "/completions", SERVER, key=key, timeout=timeout)
        self.url = endpoint.url
        self._questions = Questions(endpoint, concurrency=concurrency, retries=retries, show_progress=show_progress)

    def samples(
        self,
        scorer: Scorer,
        tokenizer: Any,
        prompts: Sequence[Ids],
        cache: GenerationCache,
        *,
        num_samples: int = 1,
        max_new_tokens: int = 128,
        seed: int = 0,
        description: str = "Sampling (server)",
    ) -> tuple[list[Sample], list[str]]:
        """Samples at temperature 1, from the cache where known.

        Args:
            scorer: The same model here; it scores what the server draws.
            tokenizer: Its tokenizer.
            prompts: Token ids of each prompt.
            cache: Where samples are kept.
            num_samples: Completions per prompt.
            max_new_tokens: Most tokens of a completion.
            seed: Sent with every request, mixed with prompt and number of the draw.
            description: Title of the progress bar.

        Returns:
            ``len(prompts) * num_samples`` samples, those of one prompt next to each other; and notes for the user.

        Raises:
            SetupError: The server refuses, or goes on failing; what it has drawn is kept.
        """
        bodies: dict[str, dict[str, Any]] = {}
        keys: list[str] = []
        settings = f"{self.url}|{self.model}|{scorer.weights_key}|{seed}|{max_new_tokens}"
        for prompt in prompts:
            for draw in range(num_samples):
                name = f"{settings}|{prompt.tolist()}|{draw}"
                key = "served|" + hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
                keys.append(key)
                if cache.get(key) is None:
                    bodies[key] = self._body(prompt, int(key[-7:], 16), max_new_tokens)
        if bodies:
            self._questions.ask(
                bodies, read_answer, lambda key, answer: cache.put([answer | {"key": key}]), description, "text"
            )
        answers = [cache.get(key) or {} for key in keys]
        ends = end_tokens(scorer.model, tokenizer)
        ids = [_ids(answer, tokenizer, ends, max_new_tokens) for answer in answers]
        drawn = [
            Sample(
                prompt_index=number // num_samples,
                text=answer["text"],
                prompt_ids=prompts[number // num_samples].tolist(),
                token_ids=tokens,
                logps=np.zeros(len(tokens), np.float32),
                finished=tokens[-1] in ends,
            )
            for number, (answer, tokens) in enumerate(zip(answers, ids, strict=True))
        ]
        logps = [each for item in scorer.logps(sample_items(drawn), "Scoring samples") for each in item]
        samples = [_with(sample, each) for sample, each in zip(drawn, logps, strict=True)]
        return samples, _notes(samples, answers)

    def _body(self, prompt: Ids, seed: int, max_new_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt.tolist(),
            "max_tokens": max_new_tokens,
            "seed": seed,
            # The whole distribution: servers cut its tail by default.
            **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
            "logprobs": 1,
            "return_token_ids": True,
        }


def read_answer(answer: Any) -> dict[str, Any]:
    """What is kept of a completion.

    Args:
        answer: The answer's JSON.

    Returns:
        ``text``, ``token_ids`` and ``server_logps`` where the server tells them, and whether it ended by itself.

    Raises:
        TypeError: It is no completion; so are ``LookupError`` and ``AttributeError``.
    """
    choice = answer["choices"][0]
    if not isinstance(choice["text"], str):
        raise TypeError("without text")
    logps = (choice.get("logprobs") or {}).get("token_logprobs")
    ids = choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
        raise TypeError("without tokens")
    return {
        "text": choice["text"],
        "token_ids": ids,
        "server_logps": logps,
        "finished": choice.get("finish_reason") == "stop",
    }


def _ids(answer: dict[str, Any], tokenizer: Any, ends: frozenset[int], most: int) -> list[int]:
    """The tokens that were drawn; a server that does not tell them has its text encoded."""
    told = answer.get("token_ids")
    if isinstance(told, list):
        ids = list(told)
    else:
        # No tokenizer takes half a character.
        text = answer["text"].encode("utf-8", "replace").decode("utf-8")
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])[:most]
    if not ids or (answer["finished"] and ids[-1] not in ends):
        ids.append(int(tokenizer.eos_token_id))
    return ids


def _with(sample: Sample, logps: Any) -> Sample:
    return replace(sample, logps=np.asarray(logps, dtype=np.float32))


def _notes(samples: Sequence[Sample], answers: Sequence[dict[str, Any]]) -> list[str]:
    notes = ["the server drew the samples, with random numbers of its own"]
    if any(not isinstance(answer.get("token_ids"), list) for answer in answers):
        notes.append("the server does not tell its tokens: they are those that its text is encoded to")
    differences = [
        float(np.mean(np.asarray(told, dtype=np.float64) - sample.logps[: len(told)]))
        for sample, answer in zip(samples, answers, strict=True)
        if isinstance(told := answer.get("server_logps"), list)
        and isinstance(answer.get("token_ids"), list)
        and 0 < len(told) <= len(sample.logps)
        and all(isinstance(value, (int, float)) for value in told)
    ]
    difference = float(np.mean(differences)) if differences else 0.0
    if abs(difference) > _SAME_WEIGHTS:
        notes.append(
            f"the server's log-probs are {difference:+.2f} nats per token from the model's on the same text: it seems "
            "to hold other weights"
        )
    return notes
