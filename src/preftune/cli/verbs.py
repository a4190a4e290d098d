"""The verbs of the command line, and what each does.

A verb is a module of its name in this package. Either its ``main`` takes the arguments after the verb, or its
``add_parser`` adds a parser for them and its ``run`` takes what was parsed. Both return the exit code (0, or 130 after
Ctrl-C) and raise a :class:`~preftune.errors.PreftuneError` for whatever was foreseen. Those that train share one.
"""

from __future__ import annotations

from preftune.verbs import TRAINING

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""

VERBS: dict[str, str] = {
    "run": "the whole path from a file of rows: audit, advised settings, training, evaluation, report",
    **{verb: about.summary for verb, about in TRAINING.items()},
    "eval": "accuracy, calibration, KL, samples and comparisons of a model on held-out pairs, with intervals",
    "data": "look at prepared rows: prompt, chosen, rejected, and what is trained on",
    "advise": "settings with reasons, risks of a configuration, memory and time, before anything is trained",
    "report": "write one HTML page about runs and sweeps: curves, samples, maps, settings",
    "ui": "show runs and sweeps live in the browser of this machine",
    "methods": "list the methods with formula, settings and paper",
    "recipes": "list, show or copy the published recipes",
    "export": "merge a run into a model that others can load: safetensors, GGUF, Ollama, vLLM; and say what was lost",
    "chat": "talk with a tuned model and its reference side by side",
    "cache": "show or clear the stored reference log-probs",
    "sweep": "search over settings: trials that share model, tokens and reference, and the sweet spot",
    "cite": "print BibTeX for the methods of a run",
    "demo": "teach a small model to write friendlier reviews, in minutes, without downloads",
}

SYNONYMS: dict[str, str] = {
    **dict.fromkeys(("tune", "train", "fit", "finetune", "fine-tune", "start", "go"), "run"),
    **dict.fromkeys(("merge", "gguf", "serve", "save", "deploy", "publish"), "export"),
    **dict.fromkeys(("talk", "generate", "sample", "ask", "infer", "inference"), "chat"),
    **dict.fromkeys(("evaluate", "evaluation", "score", "benchmark"), "eval"),
    **dict.fromkeys(("audit", "check", "validate"), "data audit"),
    **dict.fromkeys(("show", "view", "inspect", "tokenize"), "data show"),
    "convert": "data convert",
    **dict.fromkeys(("select", "filter", "curate"), "data select"),
    **dict.fromkeys(("dashboard", "serve-ui", "web"), "ui"),
    **dict.fromkeys(("plot", "compare", "html"), "report"),
    **dict.fromkeys(("search", "grid", "hpo"), "sweep"),
    **dict.fromkeys(("plan", "estimate", "recommend", "suggest"), "advise"),
    "simpo": "cpo --loss_type simpo",
    **{name: f"dpo --loss_type {name}" for name in ("ipo", "apo_zero", "robust", "hinge")},
    "recipe": "recipes list",
    "method": "methods",
    "bibtex": "cite",
    "version": "--version",
}
"""What people call a verb, or say when they mean one."""

TRAINING_VERBS = tuple(TRAINING)
