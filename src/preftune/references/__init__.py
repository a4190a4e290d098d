"""Where reference log-probs are kept, and how they are found again."""
