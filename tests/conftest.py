"""Small real models, a cache of the tests' own, a device over ssh, and a bundle."""

import getpass
import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from edgebuild import bundle, cache, report, settings, verify
from edgebuild.backends import BACKENDS
from edgebuild.environment import machine, versions
from edgebuild.lift import lift
from edgebuild.spec import Accuracy, LayerRow, Measurement, Parity, Plan, Remote, Report, Target, Verdict


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without anything in it, for tests of what is made on first use."""
    monkeypatch.setenv("EDGEBUILD_CACHE", str(tmp_path / "cache"))
    return cache.root()


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class SmallNet(nn.Module):
    """A residual sum, a depthwise convolution, a concat, in-place operators, a flatten: what channel groups follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = Block(16)
        self.left = nn.Conv2d(16, 16, 1)
        self.right = nn.Conv2d(16, 8, 3, padding=1, stride=1)
        self.depthwise = nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=24)
        self.point = nn.Conv2d(24, 32, 1)
        self.dropout = nn.Dropout(0.1)
        self.hidden = nn.Linear(32 * 4 * 4, 48)
        self.classify = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(nn.functional.relu_(self.stem(x)))
        x = torch.cat([self.left(x), self.right(x)], 1).relu_()
        x = torch.relu(self.point(nn.functional.relu6(self.depthwise(x))))
        x = self.dropout(torch.flatten(x, 1))
        return self.classify(torch.relu(self.hidden(x)))


class Encoder(nn.Module):
    """A transformer block: attention, feed-forward, layer norms; 72 inputs are no whole groups of 32."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(72, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.project = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.classify = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        shares = (self.query(y) @ self.key(y).transpose(1, 2) / 8).softmax(-1)
        x = x + self.project(shares @ self.value(y))
        x = x + self.down(torch.relu(self.up(self.norm2(x))))
        return self.classify(x.mean(1))


@pytest.fixture(scope="session")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    net = Encoder().eval()
    with torch.no_grad():
        net.classify.weight *= 20  # outputs as far apart as a trained model's
    return net


@pytest.fixture(scope="session")
def sentences() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(1, 12, 72, generator=generator),) for _ in range(40)]


@pytest.fixture(scope="session")
def small_net() -> nn.Module:
    """SmallNet with batch-norm statistics that are no identity, in eval mode."""
    torch.manual_seed(0)
    net = SmallNet().train()
    with torch.no_grad():
        for _ in range(5):
            net(torch.randn(16, 3, 8, 8) * 2 + 0.5)
    return net.eval()


@pytest.fixture(scope="session")
def image() -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


@pytest.fixture(scope="session")
def images() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(1, 3, 8, 8, generator=generator),) for _ in range(16)]


@pytest.fixture(autouse=True)
def no_gradients_left() -> Iterator[None]:
    yield
    torch.set_grad_enabled(True)


# --------------------------------------------------------------------------------------------- a device over ssh


@dataclass(frozen=True)
class Board:
    """A device on this machine: `temporary` and `store` are the folders that sessions there get."""

    target: Target
    port: int
    temporary: Path
    store: Path
    key: Path
    server: subprocess.Popen[bytes]

    def left(self) -> list[Path]:
        return list(self.temporary.iterdir())

    def cleaned(self) -> bool:
        """Whether the temporary folder is gone, now or in a moment."""
        for _ in range(100):
            if not self.left():
                return True
            time.sleep(0.1)
        return False

    def runners(self) -> list[int]:
        """The processes that run a model of this device."""
        commands = {process.pid: process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"])}
        return [pid for pid, words in commands.items() if words[:1] and str(self.store) in words[0]]


def new_key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path.with_suffix(".pub").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("sshd is not installed; get it with `apt-get install -y openssh-server openssh-client`")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # what a server started as root wants
    folder, port = tmp_path_factory.mktemp("sshd"), free_port()
    temporary, store = folder / "temporary", folder / "store"
    temporary.mkdir()
    server_key = new_key(folder / "server")
    (folder / "authorized_keys").write_text(new_key(folder / "user"))
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {server_key}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/server\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPermitRootLogin yes\n"
        f"SetEnv TMPDIR={temporary} XDG_CACHE_HOME={store}\n"
    )
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text().strip()}")
        options = (f"UserKnownHostsFile={folder}/known_hosts", "GlobalKnownHostsFile=/dev/null", "IdentitiesOnly=yes")
        reach = Remote(f"{getpass.getuser()}@127.0.0.1", port, str(folder / "user"), options)
        host = Target(name="host", title="", device="host", status="measured")
        target = Target(name="board", title="", device="ssh", status="measured", ssh=reach, costs_of=host)
        yield Board(target, port, temporary, store / "edgebuild", folder / "user", server)
    finally:
        server.terminate()
        server.wait()


# ------------------------------------------------------------------------------------------------------ a bundle

HOST_PROFILE = """
name = "bench"
title = "This machine"
target = "host"
artifact = "pte"

[budgets]
size = "1 MiB"
latency = "10 s"
latency_p95 = "10 s"
throughput = "0.1 /s"
peak_memory = "1 GiB"
accuracy_drop = "2 points"
min_delegated = "100 %"
"""


@dataclass(frozen=True)
class Made:
    """A bundle's files as `bundle.read` gives them, with a real artifact, and the report of the build."""

    files: dict[str, bytes]
    report: Report

    def changed(self, **fields: Any) -> dict[str, bytes]:
        """The files with another report."""
        return self.files | {"report.json": report.to_json(replace(self.report, **fields)).encode()}


@pytest.fixture(scope="session")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle's report and profile, with figures that are made up, and no artifact."""
    profile = tmp_path_factory.mktemp("profile") / "bench.toml"
    profile.write_text(HOST_PROFILE)
    written = Report(
        outcome="met",
        summary="every budget of bench is met",
        task="small",
        profile="bench",
        targets=("host",),
        artifact="small.pte",
        artifact_sha256="0" * 64,
        size=100_000,
        original_size=400_000,
        plan=Plan(precision="fp32"),
        verdicts=(Verdict("latency", "host", 10.0, 0.001, 0.002, "measured", 0.9998, "pass"),),
        accuracy=Accuracy("accuracy", 0.98, 0.97, 500, None, None, 0.01),
        parity=(Parity("host", "eager", 8, 100.0, 1.0, False, 1e-6, True),),
        measurements=(
            Measurement("host", "latency", 0.002, "measured", runs=900),
            Measurement("pixel-3a", "latency", 0.004, "simulated", 0.2),
            Measurement("", "min_delegated", 1.0, "counted"),
        ),
        original_measurements=(),
        layers=(LayerRow("stem", "conv2d", "", "fp32", (448, 448), (27648, 27648), {"host": (2e-5, 1e-5)}, 0.0),),
        rounds=(),
        reachable=(),
        frontier=(),
        dropped=(),
        trials=(),
        calibration={},
        findings=(),
        stages={},
        environment={**versions(), "machine": machine(), "inputs": "abc"},
        build_id="0123456789abcdef",
    )
    return Made({"report.json": report.to_json(written).encode()} | settings.pack(str(profile)), written)


@pytest.fixture(scope="session")
def made(paper: Made, image: tuple[Tensor, ...], images: list[tuple[Tensor, ...]]) -> Made:
    """A bundle with a real artifact and its test vectors; a build would take a minute."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    lifted = lift(model, image)
    data = BACKENDS["xnnpack"].lower(lifted, image).data
    vectors = bundle.vectors([verify.to_arrays(x) for x in images[:8]], verify.eager(lifted, images[:8]))
    written = replace(paper.report, artifact_sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    text = report.to_json(written).encode()
    return Made(paper.files | {"small.pte": data, "report.json": text, "vectors.safetensors": vectors}, written)
