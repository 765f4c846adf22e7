// Status: what every internal function that can fail returns. The sentence lives in a thread-local
// buffer, so failing allocates nothing and a Status is one int.
#pragma once

#include <cstddef>

#include "flashtile/flashtile.h"

namespace flashtile {

using Status = flashtile_status;

// Writes the sentence for flashtile_last_error() and returns `code`.
[[nodiscard]] Status fail(Status code, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

const char* last_error();

}  // namespace flashtile
