"""What a model is worth: seeded samples, log-probs, and statistics with intervals."""
