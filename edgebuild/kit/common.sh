# shellcheck shell=sh disable=SC2154
# What measure_adb.sh and measure_ssh.sh share. They set `kit` and `usage` and read this file, which takes the options
# off their arguments; then they define `on_device COMMAND`, `push FOLDER...` and `leave`, and call `measure`.

threads="1 2 4"
runs=50
output=measured.toml

fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

say() {
    printf '%s\n' "$1" >&2
}

while [ $# -gt 0 ]; do
    case $1 in
    --threads | --runs | --output)
        [ $# -gt 1 ] || fail "$1 needs a value; $usage"
        case $1 in
        --threads) threads=$2 ;;
        --runs) runs=$2 ;;
        --output) output=$2 ;;
        esac
        shift 2
        ;;
    -h | --help)
        say "$usage"
        exit 0
        ;;
    -*) fail "unknown option $1; $usage" ;;
    *) break ;;
    esac
done
case "$runs$(printf %s "$threads" | tr -d ' ')" in
*[!0-9]* | '') fail "--runs and --threads take numbers; $usage" ;;
esac

scratch=$(mktemp -d)
place='' # the folder on the device, once there is one
finish() {
    trap - EXIT
    if [ -n "$place" ]; then
        on_device "rm -rf '$place'" || say "could not remove $place from the device"
        leave
    fi
    rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 130' HUP INT TERM

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# What the device answers to a command, in one line that a TOML string can hold.
# shellcheck disable=SC1003
ask() {
    on_device "$1" 2>/dev/null | tr -d '\000\r"\\' | tr '\n' ' ' | sed 's/  *$//'
}

# One model with one number of threads; what the device says goes to $scratch/said.
time_model() {
    on_device "cd '$place' && ./$machine/lib/$loader --library-path ./$machine/lib ./$machine/runner \
--time 'models/$1.pte' $2 $runs" </dev/null >"$scratch/answer" 2>"$scratch/said" || return 1
    line=$(tr -d '\r' <"$scratch/answer" | grep '^latency_ns ')
}

# Sets `machine` and `loader` for the device, which says what it is.
choose_runner() {
    machine=$(on_device 'uname -m' | tr -d '\r')
    case $machine in
    aarch64 | arm64) machine=aarch64 loader=ld-linux-aarch64.so.1 ;;
    x86_64) loader=ld-linux-x86-64.so.2 ;;
    '') fail "the device does not answer" ;;
    *) fail "there are runners for aarch64 and x86_64, not for $machine" ;;
    esac
    [ -d "$kit/$machine" ] || fail "this kit has no runner for $machine; make one with: edgebuild targets kit --arch $machine"
}

# `measure MODEL`, where MODEL is what the device calls itself; $machine and $place are set, everything is pushed.
measure() {
    governor=$(ask 'cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor')
    cores=$(ask 'grep -c ^processor /proc/cpuinfo')
    {
        printf 'device = "%s / %s"\n' "$(ask 'uname -srm')" "$1"
        printf 'runtime = "%s"\n' "$(cat "$kit/runtime")"
        printf '# CPU governor: %s; cores: %s; inputs: made up\n' "${governor:-unknown}" "${cores:-unknown}"
    } >"$scratch/measured.toml"
    failed=''
    for path in "$kit"/models/*.pte; do
        model=${path##*/}
        model=${model%.pte}
        for count in $threads; do
            if [ "$count" -gt "${cores:-1024}" ]; then
                say "$model: $count threads left out, the device has $cores cores"
                continue
            fi
            if ! time_model "$model" "$count"; then
                say "$model, $count threads: failed: $(tail -n 1 "$scratch/said")"
                failed="$failed $model"
                continue
            fi
            # shellcheck disable=SC2086 # the line is words: latency_ns MEDIAN P95 MIN RUNS
            set -- $line
            latency=$(printf '%s\n' "$2" | awk '{ printf "%.6g", $1 / 1e6 }')
            p95=$(printf '%s\n' "$3" | awk '{ printf "%.6g", $1 / 1e6 }')
            say "$model, $count threads: $latency ms, p95 $p95 ms"
            {
                printf '\n[[measurement]]\nmodel = "%s"\nartifact_sha256 = "%s"\n' "$model" "$(sha256 "$path")"
                printf 'threads = %s\nlatency = "%s ms" # p95 %s ms\nruns = %s\n' "$count" "$latency" "$p95" "$5"
            } >>"$scratch/measured.toml"
        done
    done
    if grep -q '^\[\[measurement\]\]' "$scratch/measured.toml"; then
        cp "$scratch/measured.toml" "$output"
        say "written: $output"
    fi
    [ -z "$failed" ] || fail "failed:$failed"
}
