"""The four techniques: `candidates()` says what could be done and what it loses; `apply()` gives back a new model."""
