// The conformance set: what the machine made of every primitive, kept in conformance.txt, so that a
// GPU can be compared with it bit for bit, and so that the machine cannot change unnoticed. The
// environment variable FLASHTILE_CONFORMANCE names it where it is not at its place in the checkout.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx_test {

using Words = std::vector<uint32_t>;

// What a kernel gave for the inputs of `seed`, bit for bit. With FLASHTILE_CONFORMANCE_OUT set to a
// file the line is added there and not compared.
void check_stored(const std::string& name, uint64_t seed, const Words& got);

// The same for many words, of which a hash and the first are stored. `plain` is what plain C++
// makes of the inputs: it names the first word that differs.
void check_stored(const std::string& name, uint64_t seed, const Words& got, const Words& plain);

// Floats of which hardware may round the last bits in its own way: `units` in the last place apart
// at most. Zeros, infinities and NaNs are exact.
void check_stored_near(const std::string& name, uint64_t seed, const Words& got, uint32_t units);

// Bytes as words; there are whole words of them.
Words as_words(const void* bytes, size_t count);

}  // namespace ptx_test
