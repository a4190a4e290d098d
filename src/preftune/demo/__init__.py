"""The controlled sentiment experiment in miniature: a world whose true reward is known, and a run through it."""
