"""What Linux says of a processor's clock and heat, read on the device before and after a measurement.

Paths: Documentation/admin-guide/pm/cpufreq.rst and driver-api/thermal/sysfs-api.rst of the kernel; `vcgencmd
get_throttled` is the Raspberry Pi's own (bits 0 to 3: under-voltage, frequency capped, throttled, soft limit; 16 to 19:
the same at any time since it was started).
"""

from collections.abc import Mapping

from edgebuild.devices.remote import Connection
from edgebuild.units import Hertz

_SCRIPT = r"""
show() { if [ -r "$2" ]; then echo "$1=$(head -n 1 "$2")"; fi; }
cpu=/sys/devices/system/cpu
show governor $cpu/cpu0/cpufreq/scaling_governor
show clock $cpu/cpu0/cpufreq/scaling_cur_freq
show most $cpu/cpu0/cpufreq/cpuinfo_max_freq
show allowed $cpu/cpu0/cpufreq/scaling_max_freq
show throttles $cpu/cpu0/thermal_throttle/core_throttle_count
echo "load=$(cut -d' ' -f1 /proc/loadavg)"
echo "cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || grep -c ^processor /proc/cpuinfo)"
for zone in /sys/class/thermal/cooling_device*; do
    case "$(cat "$zone/type" 2>/dev/null)" in
    *cpufreq* | Processor) show "cooling_${zone##*/cooling_device}" "$zone/cur_state" ;;
    esac
done
if command -v vcgencmd >/dev/null; then vcgencmd get_throttled; fi
true
"""

_PI = {0: "the voltage is too low", 1: "the clock is capped", 2: "it is throttled", 3: "it is at its soft heat limit"}


def read(connection: Connection) -> dict[str, str]:
    """Each figure that the device has, by a name of `_SCRIPT`."""
    pairs = (line.partition("=") for line in connection.run(_SCRIPT).splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def notes(before: Mapping[str, str], after: Mapping[str, str], threads: int) -> list[str]:
    """What a reader of the figures has to know, in words: governor, clock, load, and anything that slowed it down."""
    said = [f"load before: {before['load']} on {before.get('cores', '?')} cores"] if "load" in before else []
    if threads > int(before.get("cores", threads)):
        said.append(f"more threads than its {before['cores']} cores")
    governor = after.get("governor")
    if governor is None:
        said.append("no CPU governor to read")
    else:
        said.append(f"CPU governor {governor}" + (f" at {_clock(after['clock'])}" if "clock" in after else ""))
        if governor != "performance":
            said.append("not performance: the clock may have changed between runs")
    if _number(after, "allowed") < _number(after, "most"):
        said.append(f"the clock is limited to {_clock(after['allowed'])} of {_clock(after['most'])}")
    return said + _heat(before, after)


def _heat(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    said = []
    if _number(after, "throttles") > _number(before, "throttles"):
        said.append("it was throttled by heat during the runs")
    if any(_number(facts, key) > 0 for facts in (before, after) for key in facts if key.startswith("cooling_")):
        said.append("its thermal governor holds the clock down")
    flags = int(after.get("throttled", "0"), 16) | int(before.get("throttled", "0"), 16)
    said += [f"Raspberry Pi: {meaning}" for bit, meaning in _PI.items() if flags >> bit & 1]
    if flags >> 16 and not flags & 0xF:
        said.append("Raspberry Pi: it was throttled or short of voltage before, since it was started")
    return said


def _number(facts: Mapping[str, str], key: str) -> int:
    text = facts.get(key, "")
    return int(text) if text.isdecimal() else 0


def _clock(kilohertz: str) -> str:
    return str(Hertz(float(kilohertz) * 1000)) if kilohertz.isdecimal() else f"{kilohertz} kHz"
