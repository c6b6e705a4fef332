"""The four techniques: `candidates()` says what could be done and what it loses; `apply()` gives back a new model."""

from edgebuild.transforms import distil, factorize, prune, quantize

TRANSFORMS = {"prune": prune, "factorize": factorize, "distil": distil, "quantize": quantize}
