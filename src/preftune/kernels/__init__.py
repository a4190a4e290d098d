"""How log-probs are computed: attention over packed rows and the tiled language-model head."""
