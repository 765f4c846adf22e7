#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace flashtile {
namespace {

thread_local char sentence[512] = "";

}  // namespace

Status fail(Status code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(sentence, sizeof sentence, format, arguments);
  va_end(arguments);
  return code;
}

const char* last_error() { return sentence; }

}  // namespace flashtile
