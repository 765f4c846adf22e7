// The whole test framework: TEST("name") { CHECK(condition); SKIP("reason"); }, and a main.
//
//   prog            runs every test        prog "name" ...   runs these
//   prog --list     prints the names
//
// Exit status 0: passed, 1: a check failed, 77: everything that was asked for skipped itself.
// With FLASHTILE_REQUIRE_GPU=1 a SKIP_WITHOUT_GPU is a failure.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};
struct Skipped {
  std::string reason;
};

inline std::vector<Test> tests;
inline int failures = 0;
// Why no test of this program can run here, or ""; asked before each, so that none makes its
// tensors in vain. Null: nothing is needed.
inline std::string (*unavailable)() = nullptr;

struct Registration {
  Registration(const char* name, void (*run)()) { tests.push_back({name, run}); }
};

inline void report(bool ok, const char* file, int line, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("%s:%d: %s\n", file, line, what.c_str());
  if (failures == 21) std::printf("(further failures are counted, not printed)\n");
}

template <class T>
std::string show(const T& value) {
  if constexpr (std::is_convertible_v<T, std::string>) {
    return '"' + std::string(value) + '"';
  } else if constexpr (std::is_enum_v<T>) {
    return std::to_string(static_cast<long long>(value));
  } else {
    return std::to_string(value);
  }
}

template <class A, class B>
void report_equal(const A& a, const B& b, const char* file, int line, const char* text) {
  report(a == b, file, line, std::string(text) + ": " + show(a) + " is not " + show(b));
}

inline bool gpu_is_required() {
  const char* value = std::getenv("FLASHTILE_REQUIRE_GPU");
  return value != nullptr && std::string(value) == "1";
}

enum class Outcome { kPassed, kFailed, kSkipped };

inline Outcome run(const Test& test) {
  const int before = failures;
  try {
    if (const std::string reason = unavailable ? unavailable() : ""; !reason.empty()) {
      if (!gpu_is_required()) throw Skipped{reason};
      throw std::runtime_error("GPU required: " + reason);
    }
    test.run();
  } catch (const Skipped& skipped) {
    std::printf("SKIP %s: %s\n", test.name, skipped.reason.c_str());
    return Outcome::kSkipped;
  } catch (const std::exception& error) {
    report(false, test.name, 0, std::string("exception: ") + error.what());
  }
  std::printf("%s %s\n", failures == before ? "PASS" : "FAIL", test.name);
  return failures == before ? Outcome::kPassed : Outcome::kFailed;
}

inline int run_all(int count, char** names) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  int passed = 0, skipped = 0, found = 0;
  const auto count_outcome = [&](const Test& test) {
    const Outcome outcome = run(test);
    passed += outcome == Outcome::kPassed;
    skipped += outcome == Outcome::kSkipped;
    ++found;
  };
  for (const Test& test : tests) {
    bool wanted = count <= 1;
    for (int i = 1; i < count; ++i) wanted = wanted || std::string(names[i]) == test.name;
    if (wanted) count_outcome(test);
  }
  if (found == 0 || (count > 1 && found != count - 1)) {
    std::printf("not every name is a test here; --list prints the names\n");
    return 1;
  }
  if (failures > 0) std::printf("%d checks failed\n", failures);
  return failures > 0 ? 1 : passed == 0 && skipped > 0 ? 77 : 0;
}

inline int list() {
  for (const Test& test : tests) std::printf("%s\n", test.name);
  return 0;
}

}  // namespace check

#define FLASHTILE_JOIN2(a, b) a##b
#define FLASHTILE_JOIN(a, b) FLASHTILE_JOIN2(a, b)
#define TEST(name)                                                          \
  static void FLASHTILE_JOIN(test_, __LINE__)();                            \
  static const check::Registration FLASHTILE_JOIN(registration_, __LINE__)( \
      name, &FLASHTILE_JOIN(test_, __LINE__));                              \
  static void FLASHTILE_JOIN(test_, __LINE__)()
// torch's logging header has macros of these names.
#undef CHECK
#undef CHECK_EQ
#define CHECK(condition) check::report(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_MESSAGE(condition, message) \
  check::report(static_cast<bool>(condition), __FILE__, __LINE__, (message))
#define CHECK_EQ(a, b) check::report_equal((a), (b), __FILE__, __LINE__, #a " == " #b)
#define SKIP(reason) \
  throw check::Skipped { reason }
#define SKIP_WITHOUT_GPU(reason)                                                        \
  do {                                                                                  \
    if (!check::gpu_is_required()) SKIP(reason);                                        \
    check::report(false, __FILE__, __LINE__, std::string("GPU required: ") + (reason)); \
    return;                                                                             \
  } while (false)
