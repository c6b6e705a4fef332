"""A connection to a device through the system's OpenSSH client, with the user's own configuration, keys and agent.

One connection is opened and everything goes through it. Its own session holds a temporary folder on the device: when it
ends, in whatever way, the device's side ends the runner and removes the folder. Nothing is ever asked: where a password
or a host's key would have to be confirmed, the connection fails.
"""

import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgebuild.errors import DeviceError, MissingEnvironment
from edgebuild.spec import Remote

INSTALL = "apt-get install -y openssh-client"
CONNECT_TIMEOUT = 10  # seconds to reach the device; ConnectTimeout among the target's options goes first
LOGIN_TIMEOUT = 60.0  # seconds for all of reaching it, logging in and the first answer
COMMAND_TIMEOUT = 60.0  # seconds for a short command
TRANSFER_TIMEOUT = 600.0  # seconds for copying
LOST = 255  # ssh's exit code for an error of its own

_HELLO = "edgebuild-session"

# Runs in a POSIX shell on the device for as long as its input is open, which ends with the connection. The trap on EXIT
# alone would not do: shells leave without it when a signal ends them.
_HOLD = f"""\
dir=$(mktemp -d "${{TMPDIR:-/tmp}}/edgebuild-XXXXXX") || exit 1
clean() {{
    trap - EXIT
    if [ -f "$dir/pid" ]; then kill -9 "$(cat "$dir/pid")" 2>/dev/null; fi
    rm -rf "$dir"
}}
trap clean EXIT
trap 'exit 1' HUP INT PIPE TERM
echo {_HELLO}
uname -m
uname -srm
echo "$dir"
echo "${{XDG_CACHE_HOME:-$HOME/.cache}}/edgebuild"
cat >/dev/null
"""

# What ssh says, what it means, and the remedy.
_CAUSES = (
    ("could not resolve hostname", "there is no such host", "check host in the target's [ssh] table"),
    ("connection refused", "nothing answers on that port", "start its ssh server, or check port in [ssh]"),
    ("connection timed out", "it does not answer", "is it switched on and in this network?"),
    ("operation timed out", "it does not answer", "is it switched on and in this network?"),
    ("no route to host", "it cannot be reached", "is it switched on and in this network?"),
    ("network is unreachable", "it cannot be reached", "is it switched on and in this network?"),
    ("host key verification failed", "its host key is not known, or has changed", "connect once by hand: {ssh}"),
    ("permission denied", "it takes none of the keys, and passwords are never asked for", "{copy}"),
    ("too many authentication failures", "it takes none of the keys", "set identity_file in [ssh]"),
)


@dataclass
class Connection:
    """An open connection; `folder` and `store` are paths on the device, a temporary folder and one that is kept."""

    name: str
    arguments: list[str]
    machine: str
    system: str
    folder: str
    store: str

    def words(self, script: str) -> list[str]:
        """The command that runs a script in a POSIX shell on the device, whatever the shell of the account is."""
        return [*self.arguments, f"exec sh -c {shlex.quote(script)}"]

    def run(self, script: str, data: bytes = b"", timeout: float = COMMAND_TIMEOUT) -> str:
        """Run a script on the device with `data` as its input. Raises DeviceError where it fails or takes too long."""
        try:
            done = subprocess.run(self.words(script), input=data, capture_output=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.name} did not answer within {timeout:g} s") from None
        if done.returncode == LOST:
            raise DeviceError(f"{self.name}: the connection was lost{_last_line(done.stderr)}")
        if done.returncode:
            raise DeviceError(f"{self.name}: a command failed with code {done.returncode}{_last_line(done.stderr)}")
        return done.stdout.decode(errors="replace")


def client() -> str:
    """The path of `ssh`. Raises MissingEnvironment."""
    path = shutil.which("ssh")
    if path is None:
        raise MissingEnvironment("ssh, which this device is reached by, is not installed", INSTALL)
    return path


def status() -> tuple[str, bool, str]:
    """The client, whether it is there, and where it is or how to get it."""
    path = shutil.which("ssh")
    return "ssh", path is not None, path or INSTALL


@contextmanager
def connect(remote: Remote, name: str) -> Iterator[Connection]:
    """Open a connection, closed with the block. Raises MissingEnvironment without a client, DeviceError on failure."""
    ssh = client()
    with tempfile.TemporaryDirectory(prefix="edgebuild-ssh-") as scratch, tempfile.TemporaryFile() as errors:
        control = [f"-oControlPath={scratch}/s"]
        opening = [ssh, *control, "-oControlMaster=yes", "-oControlPersist=no", *_options(remote), "--", remote.host]
        # Without the open connection a further command would make one of its own.
        sharing = [ssh, *control, "-oControlMaster=no", "-oProxyCommand=false", *_options(remote), "--", remote.host]
        holder = subprocess.Popen(
            [*opening, f"exec sh -c {shlex.quote(_HOLD)}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            answer = _greeting(holder, errors, remote, name)
            yield Connection(name, sharing, *answer)
        finally:
            _let_go(holder)


def _options(remote: Remote) -> list[str]:
    """ssh takes the first value that it is given, so what must hold comes before the target's own options."""
    fixed = ["BatchMode=yes", "RequestTTY=no", "LogLevel=ERROR", "PermitLocalCommand=no", "RemoteCommand=none"]
    fixed += ["ForwardAgent=no", "ForwardX11=no", "ClearAllForwardings=yes"]
    own = list(remote.options)
    if remote.port:
        own.append(f"Port={remote.port}")
    if remote.identity_file:
        own.append(f'IdentityFile="{remote.identity_file}"')
    defaults = [f"ConnectTimeout={CONNECT_TIMEOUT}", "ServerAliveInterval=10", "ServerAliveCountMax=3"]
    return [f"-o{option}" for option in (*fixed, *own, *defaults)]


def _greeting(holder: subprocess.Popen[bytes], errors: IO[bytes], remote: Remote, name: str) -> list[str]:
    """The four lines that the device's side begins with."""
    assert holder.stdout is not None
    timer = threading.Timer(LOGIN_TIMEOUT, holder.kill)
    timer.start()
    try:
        for line in holder.stdout:  # an account may print a greeting of its own first
            if line.decode(errors="replace").strip() == _HELLO:
                lines = [holder.stdout.readline().decode(errors="replace").strip() for _ in range(4)]
                if all(lines):
                    return lines
    finally:
        timer.cancel()
    with suppress(subprocess.TimeoutExpired):
        holder.wait(timeout=5)
    errors.seek(0)
    raise _refusal(errors.read(), holder.returncode, remote, name)


def _refusal(said: bytes, code: int | None, remote: Remote, name: str) -> DeviceError:
    where = f"{name} ({remote.host})"
    port = f" -p {remote.port}" if remote.port else ""
    text = said.decode(errors="replace")
    for sign, meaning, remedy in _CAUSES:
        if sign in text.lower():
            ssh, copy = f"ssh{port} {remote.host}", f"ssh-copy-id{port} {remote.host}"
            return DeviceError(f"{where}: {meaning}{_last_line(said)}", remedy.format(ssh=ssh, copy=copy))
    if code is not None and code < 0:
        return DeviceError(f"{where} did not log in within {LOGIN_TIMEOUT:g} s")
    return DeviceError(f"{where}: the connection failed with code {code}{_last_line(said)}")


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()[:300]}" if lines else ""


def _let_go(holder: subprocess.Popen[bytes]) -> None:
    """End the device's side in good order, so that the folder is gone when this returns, else by force."""
    assert holder.stdin is not None and holder.stdout is not None
    with suppress(BrokenPipeError):
        holder.stdin.close()
    try:
        holder.wait(timeout=10)
    except subprocess.TimeoutExpired:
        holder.kill()
        holder.wait()
    holder.stdout.close()


def quoted(path: str) -> str:
    """A path of the device as the shell's words take it."""
    return shlex.quote(path)


def send(connection: Connection, source: Path, target: str) -> None:
    """Copy a file into a path on the device."""
    connection.run(f"cat >{quoted(target)}", source.read_bytes(), TRANSFER_TIMEOUT)
