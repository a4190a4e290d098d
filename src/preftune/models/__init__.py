"""Loading models, getting at their heads, and deciding whether they can run on packed rows."""
