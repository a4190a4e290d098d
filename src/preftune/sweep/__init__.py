"""Sweeps: one study over any settings, whose trials share model, tokens and reference values.

From the ground up: :mod:`~preftune.sweep.space` says what is searched, :mod:`~preftune.sweep.plan` keeps it in the
sweep's folder, :mod:`~preftune.sweep.board` hands every trial to exactly one worker, :mod:`~preftune.sweep.runner`
says what a runner of trials is, :mod:`~preftune.sweep.worker` is a worker's loop, :mod:`~preftune.sweep.choice` finds
the sweet spot and :mod:`~preftune.sweep.result` writes it down. :mod:`~preftune.sweep.options` are the flags,
:mod:`~preftune.sweep.setup` makes the plan, :mod:`~preftune.sweep.trials` and :mod:`~preftune.sweep.fused` train,
and :mod:`~preftune.sweep.run` runs what is left.
"""
