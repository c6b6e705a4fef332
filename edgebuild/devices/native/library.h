// Where XNNPACK's code lies, to tell by a return address whether a call comes from there.
#pragma once
#include <cstdint>
#include <cstring>
#include <link.h>

struct Code {
    uintptr_t begin = 0, end = 0;
};

// Empty where the library is not loaded.
inline Code xnnpack_code() {
    Code found;
    dl_iterate_phdr(
        [](dl_phdr_info *library, size_t, void *code) {
            if (std::strstr(library->dlpi_name, "libexecutorch_backend_xnnpack") == nullptr) return 0;
            for (int i = 0; i < library->dlpi_phnum; ++i) {
                const auto &part = library->dlpi_phdr[i];
                if (part.p_type != PT_LOAD || (part.p_flags & PF_X) == 0) continue;
                const uintptr_t begin = library->dlpi_addr + part.p_vaddr;
                *static_cast<Code *>(code) = {begin, begin + part.p_memsz};
            }
            return 1;
        },
        &found);
    return found;
}
