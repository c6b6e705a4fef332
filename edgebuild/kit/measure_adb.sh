#!/bin/sh
# Measures the models of this kit on an Android device that adb reaches, and writes measured.toml in the current folder.
# The device needs no root; keep its screen on and let it cool first.
set -eu

usage='usage: measure_adb.sh [--threads "1 2 4"] [--runs 50] [--output measured.toml] [SERIAL]'
kit=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$kit/common.sh"

[ $# -le 1 ] || fail "$usage"
[ $# -eq 0 ] || export ANDROID_SERIAL="$1"
command -v adb >/dev/null || fail "adb is not installed; it is part of Android's platform tools"

on_device() {
    adb shell "$1"
}

push() {
    for folder in "$@"; do adb push "$kit/$folder" "$place/" >&2 || return 1; done
}

leave() { :; }

choose_runner
place=/data/local/tmp/edgebuild-$$
on_device "mkdir -p $place" || fail "the device cannot make a folder"
push "$machine" models || fail "copying to the device failed"
on_device "chmod 755 $place/$machine/runner $place/$machine/lib/*"
measure "$(ask 'getprop ro.product.model')"
