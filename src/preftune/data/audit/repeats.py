"""The same thing twice: rows, prompts, pairs the other way round, circles, and test rows among the training rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from preftune.data.audit.near import NearIndex, Shingled
from preftune.data.audit.proportions import share_of
from preftune.data.audit.report import Finding, Severity
from preftune.data.audit.rows import Rows
from preftune.data.audit.text import SHINGLE, excerpt, same_text
from preftune.terminal.units import plural

NUM_EXAMPLES = 5
#: Pairs of one prompt from which on the prompt is said to be over-represented.
MANY_PAIRS = 10
NEAR_SOURCE = (
    f"heuristic: Jaccard similarity of {SHINGLE}-word shingles of at least 0.8; candidates by MinHash, as training data"
    " are deduplicated by Lee et al. 2021 (arXiv:2107.06499)"
)
_EXACT = "counted: texts equal but for white space"


def pair_key(rows: Rows, i: int) -> tuple[str, ...]:
    """What makes two rows the same: prompt and answers, and the label of a single answer."""
    label = (str(rows.rows[i].get("label")),) if rows.kind == "unpaired" else ()
    return (same_text(rows.prompts[i]), *map(same_text, rows.answers[i]), *label)


def check_duplicates(rows: Rows) -> list[Finding]:
    """Rows that occur more than once, and prompts with many rows."""
    first: dict[tuple[str, ...], int] = {}
    copies = [(first.setdefault(pair_key(rows, i), i), i) for i in range(len(rows))]
    flags = [i != original for original, i in copies]
    found = share_of(flags)
    severity: Severity = "ok" if not found.count else "note" if found.share < 0.01 else "warn"
    out = [
        Finding(
            "duplicate_rows",
            severity,
            f"{plural(found.count, 'row')} of {len(rows):,} repeat an earlier one",
            "A repeated row weighs as often as it stands there; remove the copies unless that is meant."
            if found.count
            else "No row occurs twice.",
            **found.fields(),
            examples=tuple({"row": rows.numbers[i], "repeats": rows.numbers[o]} for o, i in copies if i != o)[
                :NUM_EXAMPLES
            ],
            source=f"{_EXACT}; heuristic: 'warn' from 1 % on",
            threshold_kind="heuristic",
        )
    ]
    if any(rows.prompts):
        out.append(_repeated_prompts(rows))
    return out


def _repeated_prompts(rows: Rows) -> Finding:
    counts = Counter(map(same_text, rows.prompts))
    flags = [counts[same_text(prompt)] > MANY_PAIRS for prompt in rows.prompts]
    found = share_of(flags)
    most = [(prompt, n) for prompt, n in counts.most_common(NUM_EXAMPLES) if n > 1]
    repeated = sum(n > 1 for n in counts.values())
    where = {prompt: rows.numbers[i] for i, prompt in reversed(list(enumerate(map(same_text, rows.prompts))))}
    return Finding(
        "repeated_prompts",
        "note" if found.count else "ok",
        f"{len(counts):,} distinct prompts, {repeated:,} of them with several rows (at most {max(counts.values()):,})",
        f"{plural(found.count, 'row')} belong to prompts with more than {MANY_PAIRS} rows: a few prompts decide more"
        " than the others, and intervals have to be clustered by prompt, as they are here."
        if found.count
        else "No prompt outweighs the others. Rows of one prompt are kept together wherever an interval is given here.",
        **found.fields(),
        examples=tuple({"row": where[prompt], "rows": n, "prompt": excerpt(prompt)} for prompt, n in most),
        source=f"heuristic: more than {MANY_PAIRS} rows of one prompt",
        threshold_kind="heuristic",
    )


def check_contradictions(rows: Rows) -> list[Finding]:
    """Pairs that stand elsewhere the other way round, and circles of preferences."""
    edges: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i in range(len(rows)):
        prompt, better, worse = pair_key(rows, i)
        edges[prompt, better, worse].append(i)
    flags = [False] * len(rows)
    examples = []
    for (prompt, better, worse), members in edges.items():
        for i in members:
            flags[i] = better != worse and (prompt, worse, better) in edges
        if flags[members[0]] and better < worse:
            other = edges[prompt, worse, better][0]
            examples.append({"row": rows.numbers[members[0]], "against": rows.numbers[other]})
    found = share_of(flags, rows.prompts)
    pairs = Finding(
        "contradictions",
        "warn" if found.count else "ok",
        f"{plural(found.count, 'row')} prefer what another row rejects",
        "The same two answers to the same prompt are labelled both ways. At least one label of each two is wrong, or"
        " the annotators disagree; keep the majority's, or remove both."
        if found.count
        else "No pair is labelled both ways.",
        **found.fields(),
        examples=tuple(examples[:NUM_EXAMPLES]),
        source=_EXACT,
    )
    return [pairs, _circles(rows, edges)]


def check_labels(rows: Rows) -> Finding:
    """Single answers that are called good in one row and bad in another."""
    labels: dict[tuple[str, ...], set[bool]] = defaultdict(set)
    keys = [pair_key(rows, i)[:2] for i in range(len(rows))]
    for key, row in zip(keys, rows.rows, strict=True):
        labels[key].add(bool(row["label"]))
    flags = [len(labels[key]) > 1 for key in keys]
    found = share_of(flags, rows.prompts)
    good = share_of([bool(row["label"]) for row in rows.rows], rows.prompts)
    return Finding(
        "label_contradictions",
        "warn" if found.count else "ok",
        f"{plural(found.count, 'row')} call an answer good that another row calls bad; {good} are labelled good",
        "At least one label of each two is wrong, or the annotators disagree; keep the majority's, or remove both."
        if found.count
        else "No answer is labelled both ways.",
        **found.fields(),
        examples=tuple({"row": rows.numbers[i]} for i, flag in enumerate(flags) if flag)[:NUM_EXAMPLES],
        source=_EXACT,
    )


def _circles(rows: Rows, edges: dict[tuple[str, str, str], list[int]]) -> Finding:
    """Strongly connected answers of a prompt, three or more, pairs labelled both ways left out."""
    import numpy as np
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    nodes: dict[tuple[str, str], int] = {}
    lines = [
        (nodes.setdefault((p, a), len(nodes)), nodes.setdefault((p, b), len(nodes)), members[0])
        for (p, a, b), members in edges.items()
        if a != b and (p, b, a) not in edges
    ]
    flags = [False] * len(rows)
    examples: dict[int, list[int]] = {}
    if lines:
        heads, tails = np.array([line[0] for line in lines]), np.array([line[1] for line in lines])
        graph = csr_matrix((np.ones(len(lines)), (heads, tails)), shape=(len(nodes), len(nodes)))
        _, part = connected_components(graph, directed=True, connection="strong")
        for head, tail, i in lines:
            if part[head] == part[tail]:
                flags[i] = True
                examples.setdefault(int(part[head]), []).append(rows.numbers[i])
    found = share_of(flags, rows.prompts)
    return Finding(
        "circles",
        "warn" if found.count else "ok",
        f"{plural(len(examples), 'circle')} of preferences (A over B, B over C, C over A)",
        "No reward can satisfy all pairs of a circle: at least one of them is mislabelled or the annotators disagree."
        if found.count
        else "Preferences contradict each other nowhere across three or more answers of a prompt.",
        **found.fields(),
        examples=tuple({"row": numbers[0], "rows": numbers} for numbers in examples.values())[:NUM_EXAMPLES],
        source="counted: strongly connected answers of one prompt; a Bradley-Terry reward orders them",
    )


def check_near_duplicates(rows: Rows, progress: Callable[[Iterable[Any], str], Iterable[Any]]) -> list[Finding]:
    """Rows and prompts that are nearly the same as earlier ones, and pairs nearly the same the other way round."""
    seen: set[tuple[str, ...]] = set()
    index, prompts = NearIndex(), NearIndex()
    copies: list[tuple[int, int]] = []
    flipped: list[tuple[int, int]] = []
    similar: list[tuple[int, int]] = []
    known_prompts: set[str] = set()
    for i in progress(range(len(rows)), "near duplicates"):
        prompt = same_text(rows.prompts[i])
        if prompt and prompt not in known_prompts:
            known_prompts.add(prompt)
            _find(prompts, Shingled.of(prompt), i, similar)
        key = pair_key(rows, i)
        if key in seen:
            continue
        seen.add(key)
        # Labelled both ways to the letter is a finding of its own.
        if rows.paired and (key[0], key[2], key[1]) not in seen:
            other = index.find(Shingled.of(key[0], key[2], key[1]))
            if other is not None:
                flipped.append((other, i))
        _find(index, Shingled.of(key[0], *key[1 : 1 + len(rows.answers[i])]), i, copies)
    out = [_near(rows, copies, "near_duplicate_rows", "rows", "are nearly the same as an earlier one")]
    if rows.paired:
        out.append(_near(rows, flipped, "near_contradictions", "rows", "are nearly an earlier one the other way round"))
    if any(rows.prompts):
        out.append(_near(rows, similar, "near_duplicate_prompts", "prompts", "are nearly the same as an earlier one"))
    return out


def _find(index: NearIndex, item: Shingled, i: int, hits: list[tuple[int, int]]) -> None:
    other = index.find(item)
    if other is None:
        index.add(i, item)
    else:
        hits.append((other, i))


def _near(rows: Rows, hits: Sequence[tuple[int, int]], check: str, what: str, words: str) -> Finding:
    marked = {i for _, i in hits}
    found = share_of([i in marked for i in range(len(rows))], rows.prompts)
    limit = 0.05
    if check == "near_contradictions":
        severity: Severity = "warn" if found.count else "ok"
        detail = "Almost the same answers to almost the same prompt are labelled both ways; look at them."
        source = NEAR_SOURCE
    else:
        severity = "ok" if not found.count else "note" if found.share < limit else "warn"
        detail = "They weigh a topic up, and may stand on both sides of a split; remove them before splitting."
        source = f"{NEAR_SOURCE}; 'warn' from {limit:.0%} on"
    return Finding(
        check,
        severity,
        f"{found.count:,} {what} {words}",
        detail if found.count else "There are none.",
        **found.fields(),
        examples=tuple({"row": rows.numbers[i], "like": rows.numbers[other]} for other, i in hits[:NUM_EXAMPLES]),
        source=source,
        threshold_kind="heuristic",
    )


def check_leakage(train: Rows, test: Rows, progress: Callable[[Iterable[Any], str], Iterable[Any]]) -> list[Finding]:
    """Test rows that stand among the training rows, to the letter or nearly."""
    known_rows = {_unordered(train, i): i for i in reversed(range(len(train)))}
    known_prompts = {same_text(prompt): i for i, prompt in reversed(list(enumerate(train.prompts))) if prompt}
    same = [known_rows.get(_unordered(test, i)) for i in range(len(test))]
    prompt_only = [known_prompts.get(same_text(prompt)) for prompt in test.prompts]
    index = NearIndex()
    # Whole rows where the format has no prompt.
    texts = train.prompts if any(train.prompts) else train.chosen
    asked = test.prompts if any(test.prompts) else test.chosen
    for text in progress(dict.fromkeys(map(same_text, texts)), "training prompts"):
        item = Shingled.of(text)
        if index.find(item) is None:
            index.add(len(index), item)
    cache: dict[str, bool] = {}
    near = []
    for text, exact in zip(map(same_text, asked), prompt_only, strict=True):
        if exact is None and text not in cache:
            cache[text] = index.find(Shingled.of(text)) is not None
        near.append(exact is None and cache[text])
    return [
        _leak("leaked_rows", test, [hit is not None for hit in same], "are in the training data, whatever their label"),
        _leak("leaked_prompts", test, [hit is not None for hit in prompt_only], "have a prompt of the training data"),
        _leak("near_leaked_prompts", test, near, "have nearly a prompt of the training data"),
    ]


def _unordered(rows: Rows, i: int) -> tuple[str, ...]:
    return (same_text(rows.prompts[i]), *sorted(map(same_text, rows.answers[i])))


def _leak(check: str, test: Rows, flags: Sequence[bool], words: str) -> Finding:
    found = share_of(flags, test.prompts)
    near = check == "near_leaked_prompts"
    severity: Severity = (
        "ok" if not found.count else "note" if near else "problem" if check == "leaked_rows" else "warn"
    )
    return Finding(
        check,
        severity,
        f"{found.count:,} of {len(test):,} test rows {words}",
        "Results on these rows say how well the training data are remembered; take them out of the test split."
        if found.count
        else "There are none.",
        **found.fields(),
        examples=tuple({"row": test.numbers[i]} for i, flag in enumerate(flags) if flag)[:NUM_EXAMPLES],
        source=NEAR_SOURCE if near else _EXACT,
        threshold_kind="heuristic" if near else "none",
    )
