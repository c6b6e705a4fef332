// Shows the process another machine. ExecuTorch's cpuinfo reads /proc/cpuinfo and /sys/devices/system/cpu to learn which
// core it is on, and XNNPACK chooses its micro-kernels by the answer. Where EDGEBUILD_MACHINE names a folder, files
// below these two paths are opened below that folder instead. (An emulator's own path prefix would not do: newer
// versions of qemu make up a /proc/cpuinfo of their own before they look there.)
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>

namespace {

bool describes_the_machine(const char *path) {
    static constexpr char sys[] = "/sys/devices/system/cpu";
    return std::strcmp(path, "/proc/cpuinfo") == 0 || std::strncmp(path, sys, sizeof sys - 1) == 0;
}

}  // namespace

extern "C" int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : 0;
    va_end(rest);

    char moved[4096];
    const char *machine = std::getenv("EDGEBUILD_MACHINE");
    if (machine != nullptr && describes_the_machine(path)) {
        const int length = std::snprintf(moved, sizeof moved, "%s%s", machine, path);
        if (length > 0 && static_cast<size_t>(length) < sizeof moved) path = moved;
    }
    return openat(AT_FDCWD, path, flags, mode);
}
