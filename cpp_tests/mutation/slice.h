// The slice whose cases run.
#pragma once

#include <cstdlib>
#include <string>

namespace flashtile::test {

// FLASHTILE_TEST_HEAD_DIM, else 64. Head dims down to half of it belong to the slice.
inline int slice() {
  const char* text = std::getenv("FLASHTILE_TEST_HEAD_DIM");
  return text == nullptr ? 64 : std::stoi(text);
}

}  // namespace flashtile::test
