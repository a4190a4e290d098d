"""Tests on a pretrained model, which ``make real`` makes from a package of the registry."""
