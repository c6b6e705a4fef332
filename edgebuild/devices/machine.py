"""What a process on the simulated device sees of its machine: `/proc/cpuinfo` and `/sys/devices/system/cpu`.

ExecuTorch's cpuinfo reads these files and XNNPACK picks its micro-kernels by them, so that the simulated device runs
the kernels of the real core. Only the cluster that runs the model is shown: the emulator passes on the number of
whatever host core it happens to be on, and with a second kind of core in the files that number would decide which
kernels run.
"""

from pathlib import Path

from edgebuild import cache
from edgebuild.spec import Cluster, Identity


def folder(cluster: Cluster) -> Path:
    """A folder that holds the cluster's `proc` and `sys`, kept in the cache by content."""
    files = _files(cluster)
    key = cache.key(*(part for name in sorted(files) for part in (name, files[name])))

    def write(made: Path) -> None:
        for name, text in files.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return cache.folder("arm", f"machine-{key[:16]}", write)


def midr(identity: Identity) -> int:
    """The core's main ID register, without its architecture field (Arm Architecture Reference Manual, MIDR_EL1)."""
    implementer, variant, part, revision = (
        int(text, 16) for text in (identity.implementer, identity.variant, identity.part, identity.revision)
    )
    return implementer << 24 | variant << 20 | part << 4 | revision


def _files(cluster: Cluster) -> dict[str, str]:
    """Text by path, as Linux writes it (Documentation/admin-guide/cputopology.rst and cpu-freq's sysfs-interface)."""
    identity, last = cluster.identity, cluster.count - 1
    everyone = f"0-{last}\n" if last else "0\n"
    clock = f"{round(cluster.clock.rate / 1000)}\n"  # in kHz
    root = "sys/devices/system/cpu"
    files = {
        f"{root}/kernel_max": f"{last}\n",
        f"{root}/possible": everyone,
        f"{root}/present": everyone,
        f"{root}/online": everyone,
    }
    cores = []
    for core in range(cluster.count):
        cores.append(
            f"processor\t: {core}\n"
            f"Features\t: {identity.features}\n"
            f"CPU implementer\t: {identity.implementer}\n"
            "CPU architecture: 8\n"
            f"CPU variant\t: {identity.variant}\n"
            f"CPU part\t: {identity.part}\n"
            f"CPU revision\t: {int(identity.revision, 16)}\n"
        )
        own = f"{root}/cpu{core}"
        files[f"{own}/cpufreq/cpuinfo_max_freq"] = clock
        files[f"{own}/cpufreq/cpuinfo_min_freq"] = clock
        files[f"{own}/topology/physical_package_id"] = "0\n"
        files[f"{own}/topology/core_id"] = f"{core}\n"
        for name in ("core_siblings_list", "package_cpus_list"):
            files[f"{own}/topology/{name}"] = everyone
        for name in ("thread_siblings_list", "core_cpus_list"):
            files[f"{own}/topology/{name}"] = f"{core}\n"
    files["proc/cpuinfo"] = "\n".join(cores)
    return files
