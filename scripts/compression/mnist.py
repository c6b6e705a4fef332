"""examples/mnist: what the teacher is worth to the feed-forward student, over seeds."""

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "mnist"
STUDENTS = ("student", "student-distilled")


def run(seeds: int) -> dict[str, Any]:
    """Train both students with each seed by the example's own script; test accuracies, their mean and deviation."""
    found: dict[str, list[float]] = {name: [] for name in STUDENTS}
    with tempfile.TemporaryDirectory(prefix="edgebuild-bench-") as folder:
        shutil.copy(EXAMPLE / "teacher.safetensors", folder)
        for seed in range(seeds):
            command = [sys.executable, str(EXAMPLE / "train.py"), *STUDENTS, "--seed", str(seed), "--output", folder]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for name in STUDENTS:
                (accuracy,) = re.findall(rf"^{name}: .*test accuracy ([0-9.]+)$", told, re.MULTILINE)
                found[name].append(float(accuracy))
            print(f"seed {seed}: " + ", ".join(f"{name} {found[name][-1]:.2%}" for name in STUDENTS), flush=True)
    gains = [b - a for a, b in zip(*found.values(), strict=True)]
    print("\n| | mean | deviation | seeds |\n| --- | --- | --- | --- |")
    for name, values in {**found, "gain": gains}.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {name} | {statistics.mean(values):.2%} | {spread:.2%} | {seeds} |")
    return {"seeds": seeds, **found, "gain": gains}
