"""Packing under extremes: one token and a hundred thousand, equal completions, no prompt, text of every plane.

Four things are drawn in turn: arrangements of trees, whose integers are compared with lists that are walked token by
token; texts, which have to come back out of a packed row as they went in; attention over odd layouts, against a full
mask in fp64; and a small model's log-probs and gradients on packed pairs, against its plain forward over each sequence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.fuzz_tally import Tally, WrongError
from torch import Tensor

from preftune.packing import PackedRow, Tree, build_row, pair_trees, plan_rows

LONG = 100_000
#: Where characters come from: every plane that has any, lone surrogates, marks, directions, controls, no characters.
PLANES = (
    *((0x20, 0x7E), (0xA0, 0x2FF), (0x300, 0x36F), (0x590, 0x6FF), (0x900, 0xDFF), (0x1100, 0x11FF), (0x2000, 0x206F)),
    *((0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xD800, 0xDFFF), (0xE000, 0xF8FF), (0xFE00, 0xFE0F), (0xFFF0, 0xFFFF)),
    *((0x10000, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2FFFF), (0x30000, 0x323AF), (0xE0000, 0xE01EF)),
    *((0xF0000, 0xFFFFF), (0x100000, 0x10FFFF), (0x0, 0x1F), (0x7F, 0x9F)),
)


def fuzz_packing(tally: Tally, examples: int, start: int, folder: Path) -> None:
    """Draw arrangements, texts, layouts and pairs in turn."""
    draw = random.Random(f"packing {start}")
    parts: tuple[Callable[[Tally, random.Random, Path], None], ...] = (_arrangement, _texts, _attention, _scored_pairs)
    for number in range(examples):
        parts[number % len(parts)](tally, draw, folder)


# ---- integers -------------------------------------------------------------------------------------------------------


def _length(draw: random.Random, most: int) -> int:
    return min(draw.choice([1, 1, 2, 3, 7, 64, 1000, most, draw.randint(1, most)]), most)


def _ids(draw: random.Random, length: int, seed: int) -> Any:
    return np.random.default_rng([seed, length]).integers(0, 1 << 20, length)


def _pairs(draw: random.Random, most: int, count: int) -> list[dict[str, Any]]:
    """Pairs as the prepared data hold them; some without prompt, some with two prompts, some with equal answers."""
    found = []
    for number in range(count):
        seed = draw.randrange(1 << 30)
        prompt = _ids(draw, 0 if draw.random() < 0.1 else _length(draw, most), seed)
        chosen = _ids(draw, _length(draw, most), seed + 1)
        rejected = chosen if draw.random() < 0.2 else _ids(draw, _length(draw, most), seed + 2)
        other = _ids(draw, _length(draw, most), seed + 3) if draw.random() < 0.2 else None
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "other": other, "slot": 2 * number})
    return found


def _trees(pair: dict[str, Any]) -> tuple[Tree, ...]:
    slots = (pair["slot"], pair["slot"] + 1)
    return pair_trees(pair["prompt"], pair["chosen"], pair["rejected"], pair["other"], slots)


def _sequences(pair: dict[str, Any]) -> list[tuple[list[int], int, int]]:
    """Tokens, length of the prompt and slot of the two sequences that a pair stands for."""
    other = pair["prompt"] if pair["other"] is None else pair["other"]
    both = ((pair["prompt"], pair["chosen"]), (other, pair["rejected"]))
    return [([*map(int, p), *map(int, c)], len(p), pair["slot"] + k) for k, (p, c) in enumerate(both)]


def _arrangement(tally: Tally, draw: random.Random, folder: Path) -> None:
    most, count = draw.choice([(8, 40), (200, 12), (LONG, 1), (LONG // 3, 2)])
    pairs = _pairs(draw, most, draw.randint(1, count))
    budget = draw.choice([1, most, 3 * most, 10 * most, 1 << 60])
    shapes = [
        tuple(len(p[k]) if p[k] is not None else None for k in ("prompt", "chosen", "rejected", "other")) for p in pairs
    ]
    tally.attempt({"pairs": shapes, "budget": budget}, lambda: check_arrangement(pairs, budget), weight=len(pairs))


def check_arrangement(pairs: Sequence[dict[str, Any]], budget: int) -> int:
    """Plan rows for pairs, build them, and compare every integer with the separate sequences.

    Returns:
        Number of pairs that no row holds.
    """
    lengths = [sum(tree.num_tokens for tree in _trees(pair)) for pair in pairs]
    rows = plan_rows(lengths, budget)
    _same("a row over the budget", [], [r for r in rows if len(r) > 1 and sum(lengths[n] for n in r) > budget])
    held = [n for row in rows for n in row]
    _same("a pair twice", len(held), len(set(held)))
    for numbers in rows:
        row = build_row([tree for n in numbers for tree in _trees(pairs[n])], numbers)
        _same("tokens of a row", sum(lengths[n] for n in numbers), row.num_tokens)
        _check_row(row, [each for n in numbers for each in _sequences(pairs[n])])
    return len(pairs) - len(set(held))


def _check_row(row: PackedRow, sequences: Sequence[tuple[list[int], int, int]]) -> None:
    """Every scored token stands in the sequence of its slot, and its source is the token before it there."""
    tree, branch = row.layout.tree_and_branch()
    position = row.position_ids
    order = np.argsort(row.target_slot, kind="stable")
    bounds = np.searchsorted(row.target_slot[order], [slot for _, _, slot in sequences] + [1 << 60])
    for number, (tokens, start, slot) in enumerate(sequences):
        where = order[bounds[number] : bounds[number + 1]]
        # The first token of a sequence has nothing before it.
        first = max(start, 1)
        _same(f"targets of slot {slot}", tokens[first:], row.target_ids[where].tolist())
        source = row.source[where]
        _same(
            f"tokens before those of slot {slot}", tokens[first - 1 : len(tokens) - 1], row.input_ids[source].tolist()
        )
        _same(f"positions of slot {slot}", list(range(first - 1, len(tokens) - 1)), position[source].tolist())
        if len(where):
            # All lie in one tree; those behind the first in one branch.
            _same(f"trees of slot {slot}", 1, len(set(tree[source].tolist())))
            _same(
                f"branches of slot {slot}",
                1,
                len({*branch[source[1:]].tolist(), *branch[source[-1:]].tolist()} - {-1} or {-1}),
            )


def _same(what: str, wanted: Any, found: Any) -> None:
    if wanted != found:
        raise WrongError(f"{what}: {str(wanted)[:200]} expected, found {str(found)[:200]}")


# ---- texts ----------------------------------------------------------------------------------------------------------


def _text(draw: random.Random, empty: float) -> str:
    if draw.random() < empty:
        return ""
    low, high = draw.choice(PLANES)
    mixed = draw.random() < 0.3
    drawn = (draw.choice(PLANES) if mixed else (low, high) for _ in range(draw.choice([1, 2, 5, 30])))
    return "".join(chr(draw.randint(*each)) for each in drawn)


def _texts(tally: Tally, draw: random.Random, folder: Path) -> None:
    rows = []
    for _ in range(draw.randint(1, 4)):
        row = {"prompt": _text(draw, 0.1), "chosen": _text(draw, 0.02), "rejected": _text(draw, 0.02)}
        if draw.random() < 0.2:
            row["rejected"] = row["chosen"]
        rows.append(row)
    rows.append({"prompt": "a", "chosen": "b", "rejected": "c"})
    tally.attempt(rows, lambda: check_texts(rows, folder / "texts.jsonl"), weight=len(rows))


def check_texts(rows: list[dict[str, str]], file: Path) -> int:
    """Load, tokenise and pack rows, and read the texts back out of the packed row.

    Returns:
        Number of rows that are neither there nor accounted for.
    """
    from benchmarks.fuzz import tiny_tokenizer

    from preftune.data import DataOptions, load, prepare

    # Lone surrogates can be spelt in JSON, and only there.
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    tokenizer = tiny_tokenizer()
    options = DataOptions(max_length=None, on_bad_rows="skip", max_dropped_share=None)
    prepared, report = prepare(load(str(file), on_bad_rows="skip")["train"], tokenizer, options, "train")
    texts = {(row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) for row in rows}
    plain = not any(0xD800 <= ord(c) <= 0xDFFF for row in rows for text in row.values() for c in text)
    for ids in prepared:
        slots = {"prompt": ids["prompt_ids"], "chosen": ids["chosen_ids"], "rejected": ids["rejected_ids"]}
        pair = {name: np.array(value, dtype=np.int64) for name, value in slots.items()}
        other = ids.get("rejected_prompt_ids")
        whole = {**pair, "other": None if other is None else np.array(other, dtype=np.int64), "slot": 0}
        check_arrangement([whole], 1 << 60)
        back = tuple(tokenizer.decode(s[0], skip_special_tokens=True) for s in _sequences(whole))
        if plain and back not in texts:
            raise WrongError(f"texts came back as {back!r}")
    accounted = report.rows_kept + sum(report.dropped.values()) + sum(report.bad_rows.values())
    _same("rows kept", report.rows_kept, len(prepared))
    return max(0, len(rows) - accounted)


# ---- attention and log-probs ----------------------------------------------------------------------------------------


def _attention(tally: Tally, draw: random.Random, folder: Path) -> None:
    pairs = _pairs(draw, draw.choice([1, 3, 40]), draw.randint(1, 4))
    dtype, seed = draw.choice([torch.float64, torch.float32]), draw.randrange(1 << 30)
    shapes = [[len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])] for pair in pairs]
    tally.attempt({"shapes": shapes, "dtype": str(dtype)}, lambda: _check_attention(pairs, dtype, seed), len(pairs))


def _check_attention(pairs: Sequence[dict[str, Any]], dtype: torch.dtype, seed: int) -> None:
    from preftune.kernels.attention import AttentionSpec, cpu, reference, sdpa

    row = build_row([tree for pair in pairs for tree in _trees(pair)])
    count, heads, dim = row.num_tokens, 2, 8
    generator = torch.Generator().manual_seed(seed)

    def tensor() -> Tensor:
        return torch.randn(1, count, heads, dim, dtype=dtype, generator=generator).transpose(1, 2).requires_grad_()

    inputs, weight = (tensor(), tensor(), tensor()), torch.randn(1, count, heads, dim, dtype=dtype, generator=generator)
    wanted = _masked(inputs[0].double(), inputs[1].double(), inputs[2].double(), _visible(pairs), dim**-0.5)
    grads = torch.autograd.grad((wanted * weight).sum(), inputs)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for backend in (cpu, sdpa, reference):
        out = backend.attend(*inputs, row.layout, AttentionSpec(scale=dim**-0.5))
        found = torch.autograd.grad((out * weight).sum(), inputs)
        for mine, exact in zip((out, *found), (wanted, *grads), strict=True):
            off = float((mine.double() - exact.double()).abs().max())
            if not off <= tolerance * (1 + float(exact.abs().max())):
                raise WrongError(f"{backend.__name__}: off by {off:.1e} in {dtype}")


def _visible(pairs: Sequence[dict[str, Any]]) -> Tensor:
    """Which token may look at which: walked through block by block as the documentation draws a row."""
    blocks: list[tuple[int, int, str]] = []
    for number, pair in enumerate(pairs):
        shared = pair["other"] is None and len(pair["prompt"]) > 0
        second = pair["prompt"] if pair["other"] is None else pair["other"]
        blocks += [(2 * number, len(pair["prompt"]), "prompt"), (2 * number, len(pair["chosen"]), "chosen")]
        if not shared:
            blocks.append((2 * number + 1, len(second), "prompt"))
        blocks.append((2 * number + (not shared), len(pair["rejected"]), "rejected"))
    owner = [(tree, kind) for tree, length, kind in blocks for _ in range(length)]
    seen = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for query, (tree, kind) in enumerate(owner):
        for key in range(query + 1):
            seen[query, key] = owner[key][0] == tree and owner[key][1] in (kind, "prompt")
    return seen


def _masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


def tiny_model(positions: int = 512) -> Any:
    """A Llama of one layer and sixteen hidden units with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config)


def _scored_pairs(tally: Tally, draw: random.Random, folder: Path) -> None:
    pairs = _pairs(draw, draw.choice([1, 2, 60]), draw.randint(1, 3))
    for pair in pairs:
        for name in ("prompt", "chosen", "rejected", "other"):
            pair[name] = None if pair[name] is None else pair[name] % 64
    shapes = [[len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])] for pair in pairs]
    tally.attempt({"shapes": shapes}, lambda: _scored(tiny_model(), pairs), weight=len(pairs))


def _scored(model: Any, pairs: Sequence[dict[str, Any]]) -> None:
    check_scores(model, pairs)


def check_scores(model: Any, pairs: Sequence[dict[str, Any]], *, with_gradient: bool = True) -> float:
    """Log-probs of all sequences, packed, against the model's plain forward over each of them.

    Returns:
        Largest difference of a sequence's log-prob, in nats.
    """
    from preftune.models.forward import RowForward

    row = build_row([tree for pair in pairs for tree in _trees(pair)])
    sequences = [each for pair in pairs for each in _sequences(pair)]
    parameters = list(model.parameters())
    forward = RowForward.of(model, packed=True)
    with forward.active():
        found = torch.zeros(2 * len(pairs)).index_add(
            0, torch.from_numpy(row.target_slot), forward(row)[0].logps.float()
        )
        # Chosen minus rejected, as losses have it.
        signs = torch.tensor([1.0, -1.0]).repeat(len(pairs))
        grads = torch.autograd.grad((found * signs).sum(), parameters, allow_unused=True)
    with torch.set_grad_enabled(with_gradient):
        plain = torch.stack([_plain(model, tokens, start) for tokens, start, _ in sequences])
    off = (found - plain).abs()
    if not bool((off <= 1e-4 * (1 + plain.abs())).all()):
        raise WrongError(f"log-probs {found.tolist()[:8]}, separately {plain.tolist()[:8]}")
    if not all(bool(grad.isfinite().all()) for grad in grads if grad is not None):
        raise WrongError("a gradient is not finite")
    if with_gradient and plain.requires_grad:
        wanted = torch.autograd.grad((plain * signs).sum(), parameters, allow_unused=True)
        for mine, exact in zip(grads, wanted, strict=True):
            if (
                mine is not None
                and exact is not None
                and not bool((mine - exact).abs().max() <= 2e-3 * (1 + exact.abs().max()))
            ):
                raise WrongError(f"gradients differ by {float((mine - exact).abs().max()):.1e}")
    return float(off.max())


def _plain(model: Any, tokens: list[int], start: int) -> Tensor:
    first = max(start, 1)
    if first >= len(tokens):
        return torch.zeros(())
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, ids[0, first:, None]).sum()


# ---- a hundred thousand tokens --------------------------------------------------------------------------------------


def fuzz_long_rows(tally: Tally, examples: int, start: int, folder: Path) -> None:
    """Forward and backward of rows of about a hundred thousand tokens: of many pairs, and of one."""
    draw = random.Random(f"long {start}")
    shapes: list[list[tuple[int, int, int]]] = [
        [(40, 30, 30)] * (LONG // 100),
        [(1, 1, 1)] * 5000 + [(0, 50_000, 1), (1, 1, 34_998)],
        [(LONG - 200, 100, 100)],
        [(100, LONG - 200, 100)],
    ]
    model = tiny_model(LONG)
    for each in shapes[:examples]:
        pairs = []
        for number, (prompt, chosen, rejected) in enumerate(each):
            drawn = (_ids(draw, n, draw.randrange(1 << 30)) % 64 for n in (prompt, chosen, rejected))
            pairs.append(
                {**dict(zip(("prompt", "chosen", "rejected"), drawn, strict=True)), "other": None, "slot": 2 * number}
            )
        short = all(max(shape) < 1000 for shape in each)
        tally.attempt({"pairs": len(pairs), "first": each[0]}, partial(_long, model, pairs, short))


def _long(model: Any, pairs: Sequence[dict[str, Any]], short: bool) -> None:
    check_arrangement(pairs, 1 << 60)
    check_scores(model, pairs, with_gradient=short)
