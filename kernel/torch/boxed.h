// Boxed kernels of the torch ops. A group of arguments that ops share is a struct with a template
// visit(member), which calls member(text of the schema, place of the value) for each of them: the
// schema and the kernel follow from this one list.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>

namespace flashtile::ops {

// The arguments of one call, in the order of the schema; the caller owns what it has read.
class Reader {
 public:
  Reader(const StableIValue* stack, uint64_t count) : stack_(stack), count_(count) {}

  template <class T>
  T next() {
    STD_TORCH_CHECK(read_ < count_, "the schema has ", count_, " arguments, the kernel reads more");
    return torch::stable::detail::to<T>(stack_[read_++]);
  }
  template <class Group>
  void read(Group& group) {
    group.visit([&](const char*, auto& value) {
      value = next<std::remove_reference_t<decltype(value)>>();
    });
  }
  void finish() const {
    STD_TORCH_CHECK(read_ == count_, "the schema has ", count_, " arguments, the kernel reads ",
                    read_);
  }

 private:
  const StableIValue* stack_;
  uint64_t count_;
  uint64_t read_ = 0;
};

// A group's part of a schema.
template <class Group>
std::string schema_of() {
  std::string text;
  Group().visit([&](const char* argument, const auto&) {
    text += (text.empty() ? "" : ", ") + std::string(argument);
  });
  return text;
}

template <class T>
void write_results(StableIValue* stack, const T& result) {
  stack[0] = torch::stable::detail::from(result);
}
template <class... T>
void write_results(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... result) { ((*stack++ = torch::stable::detail::from(result)), ...); },
             results);
}

// The kernel of an op, as torch calls it: `kRead` makes a struct of a Reader's arguments, `kRun`
// returns what the op returns, a value, a tuple of values or nothing.
template <auto kRead, auto kRun>
void boxed(StableIValue* stack, uint64_t num_args, uint64_t /*num_outputs*/) {
  Reader reader(stack, num_args);
  const auto args = kRead(reader);
  reader.finish();
  if constexpr (std::is_void_v<decltype(kRun(args))>) {
    kRun(args);
  } else {
    write_results(stack, kRun(args));
  }
}

}  // namespace flashtile::ops
