#!/bin/sh
# Measures the models of this kit on a device that ssh reaches, and writes measured.toml in the current folder.
set -eu

usage='usage: measure_ssh.sh [--threads "1 2 4"] [--runs 50] [--output measured.toml] USER@HOST [SSH-OPTION...]'
kit=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$kit/common.sh"

[ $# -ge 1 ] || fail "$usage"
host=$1
shift
options="$* -o ControlMaster=auto -o ControlPath=$scratch/ssh -o ControlPersist=30" # log in once

# shellcheck disable=SC2086 # options are words; a path with a space in it goes into ~/.ssh/config
on_device() {
    ssh -T $options -- "$host" "$1"
}

push() {
    tar -C "$kit" -cf - "$@" | on_device "tar -C '$place' -xf -"
}

# shellcheck disable=SC2086
leave() {
    ssh $options -O exit -- "$host" 2>/dev/null || true
}

choose_runner
# shellcheck disable=SC2016 # it is the device's TMPDIR
place=$(ask 'mktemp -d "${TMPDIR:-/tmp}/edgebuild-XXXXXX"')
[ -n "$place" ] || fail "$host cannot make a folder"
push "$machine" models || fail "copying to $host failed"
measure "$(ask 'cat /proc/device-tree/model 2>/dev/null || cat /sys/class/dmi/id/product_name 2>/dev/null || uname -n')"
