#!/usr/bin/env bash
# Makes .venv with edgebuild and its tools, and installs the Debian packages of the Arm and ssh targets where it may.
# Returns at once when nothing has changed since it last ran to its end. Interrupted, it starts over the next time.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=${PYTHON:-python3}
declare -A package=(
    [qemu-aarch64]=qemu-user [aarch64-linux-gnu-g++]=g++-aarch64-linux-gnu [cc]=gcc [g++]=g++
    [ssh]=openssh-client
)
# For the tests alone, and only where installing it does not start a service.
[[ -d /run/systemd/system ]] || package[sshd]=openssh-server
PATH=$PATH:/usr/sbin

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 4; }

# The Debian packages whose commands are not on the PATH.
missing() {
    local command
    for command in "${!package[@]}"; do
        command -v "$command" >/dev/null || printf '%s\n' "${package[$command]}"
    done | sort
}

install_packages() {
    local packages as_root=()
    mapfile -t packages < <(missing)
    ((${#packages[@]})) || return 0
    command -v apt-get >/dev/null || return 0
    if [[ $(id -u) != 0 ]]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null || return 0
        as_root=(sudo -n)
    fi
    say "installing ${packages[*]}"
    as_root+=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
    { "${as_root[@]}" update && "${as_root[@]}" install --yes --no-install-recommends "${packages[@]}"; } >&2 </dev/null ||
        say "apt-get could not install them"
}

make_venv() {
    local begun=$venv/.setup-begun
    if [[ -e $begun ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        say "making $venv"
        "$python" -m venv --clear "$venv" ||
            fail "$python cannot make a virtual environment; on Debian: apt-get install python3-venv"
    fi
    touch "$begun"
    say "installing edgebuild and what it needs (a minute or more, about 2 GB)"
    "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check --editable "$root[dev]" >&2 ||
        fail "pip could not install edgebuild; its message is above"
    rm "$begun"
}

# What the set-up depends on; empty where the environment cannot run.
key() {
    local version
    version=$("$venv/bin/python" --version 2>/dev/null) || return 0
    printf '%s %s %s' "$version" "$root" "$(sha256sum <"$root/pyproject.toml")"
}

stamp=$venv/.setup-done
is_done() { [[ -e $stamp && $(<"$stamp") == "$(key)" ]]; }

if ! is_done; then
    version=$("$python" --version 2>&1) || fail "no $python on the PATH; install Python 3.11 or newer, or let PYTHON name one"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$version is too old: edgebuild needs Python 3.11 or newer; let PYTHON name one"
    exec 9<"$root" # two scripts may be started side by side
    command -v flock >/dev/null && flock 9
    if ! is_done; then
        rm -f "$stamp"
        install_packages
        make_venv
        key >"$stamp.new"
        mv "$stamp.new" "$stamp"
    fi
fi

packages=$(missing | paste -sd ' ')
if [[ -n $packages ]]; then
    say "missing for the Arm and ssh targets: $packages"
    say "install them with: sudo apt-get update && sudo apt-get install --no-install-recommends $packages"
fi
