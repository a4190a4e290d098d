"""A run from settings to records: settings, data, model, trainer, training, and what is written beside the weights."""
