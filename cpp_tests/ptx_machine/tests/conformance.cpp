#include "conformance.h"

#include <cinttypes>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "../../support/check.h"

namespace ptx_test {

namespace {

constexpr size_t kFirst = 4;  // words of a line that has not all

struct Line {
  size_t count = 0;
  std::string hash;
  Words first;
};

std::string hex(uint64_t x, int digits) {
  char text[17];
  std::snprintf(text, sizeof text, "%0*" PRIx64, digits, x);
  return text;
}

std::string hash_of(const Words& words) {  // FNV-1a, 64 bits
  uint64_t hash = 0xCBF29CE484222325ull;
  for (const uint32_t word : words)
    for (int byte = 0; byte < 4; ++byte)
      hash = (hash ^ (word >> 8 * byte & 0xFF)) * 0x100000001B3ull;
  return hex(hash, 16);
}

// By "name seed".
const std::map<std::string, Line>& stored_lines() {
  static const std::map<std::string, Line> lines = [] {
    std::map<std::string, Line> all;
    const char* path = std::getenv("FLASHTILE_CONFORMANCE");
    std::ifstream file(path != nullptr ? path : PTX_CONFORMANCE_FILE);
    for (std::string text; std::getline(file, text);) {
      if (text.empty() || text[0] == '#') continue;
      std::istringstream fields(text);
      std::string name, seed;
      Line line;
      fields >> name >> seed >> line.count >> line.hash >> std::hex;
      for (uint32_t word = 0; fields >> word;) line.first.push_back(word);
      all[name + " " + seed] = line;
    }
    return all;
  }();
  return lines;
}

// True when the line was written instead of being looked up.
bool write(const std::string& key, const Words& got, size_t shown) {
  const char* path = std::getenv("FLASHTILE_CONFORMANCE_OUT");
  if (path == nullptr) return false;
  std::ofstream file(path, std::ios::app);
  file << key << ' ' << got.size() << ' ' << hash_of(got);
  for (size_t i = 0; i < shown; ++i) file << ' ' << hex(got[i], 8);
  file << '\n';
  CHECK_MESSAGE(file.good(), std::string("cannot write ") + path);
  return true;
}

// Null, and a failed check, where there is no such line.
const Line* find(const std::string& key, const Words& got) {
  const auto it = stored_lines().find(key);
  const bool fits = it != stored_lines().end() && it->second.count == got.size();
  CHECK_MESSAGE(fits, key + ": conformance.txt has no line of this name, seed and " +
                          std::to_string(got.size()) + " words");
  return fits ? &it->second : nullptr;
}

std::string difference(const std::string& key, size_t at, uint32_t got, uint32_t wanted) {
  return key + ": word " + std::to_string(at) + " is " + hex(got, 8) +
         "; stored: " + hex(wanted, 8);
}

// `wanted`: the stored words, as far as they are known.
void check_line(const std::string& key, const Line& line, const Words& got, const Words& wanted) {
  if (line.hash == hash_of(got)) return;
  for (size_t i = 0; i < got.size() && i < wanted.size(); ++i) {
    const uint32_t word = i < line.first.size() ? line.first[i] : wanted[i];
    if (got[i] == word) continue;
    CHECK_MESSAGE(false, difference(key, i, got[i], word));
    return;
  }
  CHECK_MESSAGE(false, key + ": the stored hash is of other words than plain C++ has");
}

// Distance of two floats of one sign in units of the last place; huge when only one is special.
uint32_t units_apart(uint32_t a, uint32_t b) {
  const auto is_special = [](uint32_t x) {
    const uint32_t exponent = x >> 23 & 0xFF;
    return exponent == 0 || exponent == 0xFF;
  };
  if (a == b) return 0;
  if (is_special(a) || is_special(b) || (a ^ b) >> 31 != 0) return ~uint32_t{0};
  return a > b ? a - b : b - a;
}

}  // namespace

void check_stored(const std::string& name, uint64_t seed, const Words& got) {
  const std::string key = name + " " + std::to_string(seed);
  if (write(key, got, got.size())) return;
  if (const Line* line = find(key, got)) check_line(key, *line, got, line->first);
}

void check_stored(const std::string& name, uint64_t seed, const Words& got, const Words& plain) {
  const std::string key = name + " " + std::to_string(seed);
  if (write(key, got, kFirst)) return;
  if (const Line* line = find(key, got)) check_line(key, *line, got, plain);
}

void check_stored_near(const std::string& name, uint64_t seed, const Words& got, uint32_t units) {
  const std::string key = name + " " + std::to_string(seed);
  if (write(key, got, got.size())) return;
  const Line* line = find(key, got);
  if (line == nullptr) return;
  CHECK_EQ(line->first.size(), got.size());
  for (size_t i = 0; i < line->first.size(); ++i) {
    if (units_apart(got[i], line->first[i]) <= units) continue;
    CHECK_MESSAGE(false, difference(key, i, got[i], line->first[i]) + ", " + std::to_string(units) +
                             " units of the last place apart at most");
    return;
  }
}

Words as_words(const void* bytes, size_t count) {
  CHECK_EQ(count % sizeof(uint32_t), size_t{0});
  Words words(count / sizeof(uint32_t));
  std::memcpy(words.data(), bytes, words.size() * sizeof(uint32_t));
  return words;
}

}  // namespace ptx_test
