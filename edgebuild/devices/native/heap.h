// Live and peak bytes of the heap of this process, exact to the byte and independent of page residency.
#pragma once

#include <cstddef>

namespace heap {
std::size_t live();
std::size_t peak();      // since the last reset_peak()
void reset_peak();
}  // namespace heap
