"""Statistics: intervals, paired tests, detectable effects; for data, guards, evaluation and sweeps alike."""
