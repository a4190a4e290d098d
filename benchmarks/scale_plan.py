"""What is calculated and simulated for more processes than there are here; part of ``scale.py``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Cell = dict[str, Any]

#: The plan: a model of Llama 3.1's 8B parameters on eight machines of eight H100, 50 pairs a GPU and step, bf16.
PARAMETERS, GPUS, PAIRS, PER_GPU = 8.03e9, 64, 1e9, 50
#: Peak operations per second (data sheet, dense bf16), the share of it that is assumed to be reached, bytes per second
#: of a GPU's 400 Gb/s link and of a disk, and tokens of a row.
PEAK, REACHED, LINK, DISK, ROW = 989e12, 0.4, 50e9, 2e9, 16384
#: Hours until a machine of eight GPUs fails. The first: 419 interruptions in 54 days of 16,384 GPUs (The Llama 3 Herd
#: of Models, 2407.21783, section 3.3.4).
HOURS = (16384 / 8 * 54 * 24 / 419, 500.0, 50.0)
RESTART = 900.0


def rows_a_process(each: Cell) -> int:
    """Rows that a process runs in a step."""
    rows: int = math.ceil(each["tokens"] / each["processes"] / each["row_tokens"])
    return rows


def bytes_sent(each: Cell) -> float:
    """Bytes that a process sends in a step, in fp32.

    DDP adds gradients up in a ring. FSDP2 gathers the layers for the forward, the backward and the reference of every
    row, what is outside of them for the reference and the policy, and scatters the gradients once, for which gloo adds
    all of them up in every process.
    """
    processes = each["processes"]
    part = (processes - 1) / processes * 4 * each["parameters"]
    outside = each["vocab"] * each["hidden"] / each["parameters"]
    return float(2 * part if each["engine"] == "ddp" else part * ((3 - outside) * rows_a_process(each) + 2))


def plan(read: Cell) -> dict[str, str]:
    """A run of a thousand million pairs on 64 GPUs, line by line.

    Args:
        read: What one process reads and plans, as measured.
    """
    tokens = read["tokens_a_pair"]
    step_pairs = GPUS * PER_GPU
    seconds = 8 * PARAMETERS * tokens * PER_GPU / (PEAK * REACHED)
    whole = seconds * PAIRS / step_pairs
    rows = math.ceil(PER_GPU * tokens / ROW)
    # Weights are gathered in bf16, gradients scattered in fp32.
    sent = (GPUS - 1) / GPUS * PARAMETERS * (2 * 3 * rows + 4)
    hidden = (GPUS - 1) / GPUS * 10 / LINK * PEAK * REACHED / 8
    needed = PAIRS / whole
    states = 4 * PARAMETERS * 5 / GPUS
    checkpoint = 12 * PARAMETERS
    middle = PAIRS / 2
    day = 86400
    return {
        "run": f"{PAIRS:,.0f} pairs of {tokens:.0f} tokens (the mean of HH), 8.03e9 parameters, {GPUS} H100, FSDP2, "
        f"bf16, {PER_GPU} pairs a GPU and step",
        "computing": f"{seconds:.2f} s a step and {whole / day:.0f} days, if {100 * REACHED:.0f} % of the peak are "
        "reached (assumed); a quarter of it is the reference that is run along",
        "exchange": f"{sent / 1e9:.0f} GB a GPU and step, {sent / LINK:.1f} s over a 400 Gb/s link: hidden behind "
        f"computing from rows of {hidden:,.0f} tokens on",
        "memory": f"{states / 1e9:.1f} GB a GPU for weights, gradients, Adam's state and the reference's copy in fp32, "
        "and the activations of one row",
        "balance": "slowest over mean 1.01 at 8 pairs a GPU (above), and less with more",
        "planning": f"{1e3 * read['seconds_to_share_a_step']:.1f} ms to divide 512 pairs; "
        "nothing is planned over all data",
        "reading": f"{needed:,.0f} pairs a second are needed; a process reads {read['text_a_second']:,.0f} of text and "
        f"{read['tokens_a_second']:,.0f} of token ids, and each reads all of the stream: give it token ids",
        "going on in the middle": f"reading up to there takes {middle / read['text_a_second'] / 3600:,.0f} h of text "
        f"and {middle / read['tokens_a_second'] / 3600:,.0f} h of token ids: leave the files out that were trained "
        "on, and set `ignore_data_skip: true`",
        "reference": f"run along: data that are no stream hold two values a pair in every process, "
        f"{16 * PAIRS / 1e9:.0f} GB here, and the store would take {4 * PAIRS * tokens / 2 / 1e12:.1f} TB in one file",
        "checkpoint": f"{checkpoint / 1e9:.0f} GB (weights and Adam's state in fp32), gathered in the first process's "
        f"main memory and written in {checkpoint / DISK:.0f} s at {DISK / 1e9:.0f} GB/s",
    }


def lost(interval: float, write: float, mean: float, seed: int = 0) -> float:
    """Share of the time that is no training, simulated until thousands of failures.

    Args:
        interval: Seconds of training between checkpoints.
        write: Seconds that one takes.
        mean: Mean seconds until any machine fails; failures are independent of what was before.
        seed: Of the draws.
    """
    draw = np.random.default_rng(seed)
    segments = int(np.clip(5000 * mean / interval, 2000, 2_000_000))
    left, spent = segments, 0.0
    while left:
        until = draw.exponential(mean, left)
        failed = until < interval + write
        spent += float(np.where(failed, until, interval + write).sum())
        left = again = int(failed.sum())
        # A restart may be cut short by the next failure.
        while again:
            until = draw.exponential(mean, again)
            short = until < RESTART
            spent += float(np.where(short, until, RESTART).sum())
            again = int(short.sum())
    return 1 - segments * interval / spent


def daly(interval: float, write: float, mean: float) -> float:
    """The same in expectation (Daly 2006, doi:10.1016/j.future.2004.11.016, equation 13 for an exact segment)."""
    spent = mean * math.exp(RESTART / mean) * math.expm1((interval + write) / mean)
    return 1 - interval / spent


def failures() -> list[Cell]:
    """Checkpoint intervals of the plan's run."""
    found = []
    for hours in HOURS:
        mean, write = hours * 3600 / (GPUS / 8), 12 * PARAMETERS / DISK
        # Young 1974, doi:10.1145/361147.361115.
        young = math.sqrt(2 * write * mean)
        tried = {
            young * factor: lost(young * factor, write, mean) for factor in (0.25, 0.5, 0.7, 0.85, 1, 1.2, 1.4, 2, 4)
        }
        found.append(
            {
                "hours": hours, "write": write, "restart": RESTART, "young": young,
                "best": min(tried, key=tried.__getitem__), "lost": tried[young], "daly": daly(young, write, mean),
                "tried": {round(interval): share for interval, share in tried.items()},
            }
        )  # fmt: skip
    return found
