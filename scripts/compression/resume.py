"""A build that is killed in the middle of its training and started again, against one that is not killed."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compression import builds

STEPS = 900  # as many that the first checkpoint was written when half of them are done
PROFILE = f"""
name = "resume"
title = "resume"
target = "host"
artifact = "pte"
rounds = 2
[budgets]
size = "300 kB"
[distillation]
steps = {STEPS}
time = "2 h"
"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """SHA-256 of both artifacts, at which step the one was killed, and how long after its last checkpoint."""
    task = builds.cifar(options.model, options.weights, options.images)
    hashes, killed_at, since = {}, 0, 0.0
    with tempfile.TemporaryDirectory(prefix="edgebuild-bench-") as folder:
        profile = Path(folder) / "resume.toml"
        profile.write_text(PROFILE, encoding="utf-8")
        for name in ("whole", "killed"):
            environment = {**os.environ, "EDGEBUILD_CACHE": str(Path(folder) / name)}
            bundle = Path(folder) / f"bundle-{name}"
            command = [sys.executable, "-m", "edgebuild", "build", str(task), "-p", str(profile), "-o", str(bundle)]
            if name == "killed":
                killed_at = _kill_half_way(command, environment)
                (checkpoint,) = (Path(folder) / name / "training").iterdir()  # all that the killed training left
                since = time.time() - checkpoint.stat().st_mtime
            subprocess.run(command, env=environment, check=False)
            plan = json.loads((bundle / "plan.json").read_text())
            assert plan["distil_steps"] == STEPS
            hashes[name] = hashlib.sha256((bundle / "cifar_task.pte").read_bytes()).hexdigest()
    same = hashes["whole"] == hashes["killed"]
    told = f"killed at step {killed_at} of {STEPS} or later, {since:.0f} s after its last checkpoint"
    print(f"\n{told}; the same artifact: {'yes' if same else 'NO'}")
    return {"killed_at": killed_at, "steps": STEPS, "since_checkpoint": round(since, 1), "same": same, **hashes}


def _kill_half_way(command: list[str], environment: dict[str, str]) -> int:
    """Start a build and kill it once it told half of its training's steps; the step that it told last."""
    build = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    step = 0
    assert build.stderr is not None
    for line in build.stderr:
        print(line, end="", flush=True)
        if "step " in line and " of " in line:
            step = int(line.split("step ")[1].split(" of ")[0])
            if step >= STEPS // 2:
                time.sleep(1)
                build.send_signal(signal.SIGKILL)
                build.wait()
                return step
    raise RuntimeError("the build ended before it could be killed")
