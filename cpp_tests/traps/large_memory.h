// Memory for tensors with gaps of gigabytes.
#pragma once

#include "../support/runner.h"

namespace flashtile::test {

// Of the target's device. Skips the test where there is none.
const Backend& large_backend();

}  // namespace flashtile::test
