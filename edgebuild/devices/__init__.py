"""Where artifacts run. Each device is a module that offers what `device.Device` lists; `DEVICES` is the registry."""

from edgebuild.devices import arm, cortex_m, ethos_u, host, ssh
from edgebuild.devices.device import Arrays, Device, Session, as_file

DEVICES: dict[str, Device] = {"host": host, "arm": arm, "ssh": ssh, "ethos_u": ethos_u, "cortex_m": cortex_m}

__all__ = ["DEVICES", "Arrays", "Device", "Session", "as_file"]
