// Scans a PTX file: entries with their parameters, module variables, file table. Bodies stay text.
#include "module.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

namespace ptx {

namespace {

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

// Overwrites comments with blanks, so that positions and line numbers stay.
void blank_comments(std::string& text) {
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] == '"') {
      i = text.find('"', i + 1);
      if (i == std::string::npos) return;
    } else if (text[i] == '/' && text[i + 1] == '/') {
      while (i < text.size() && text[i] != '\n') text[i++] = ' ';
    } else if (text[i] == '/' && text[i + 1] == '*') {
      const size_t end = std::min(text.find("*/", i + 2), text.size() - 2);
      for (; i < end + 2; ++i) {
        if (text[i] != '\n') text[i] = ' ';
      }
      --i;
    }
  }
}

size_t matching(const std::string& text, size_t open, char from, char to) {
  int depth = 0;
  for (size_t i = open; i < text.size(); ++i) {
    if (text[i] == '"') {
      i = text.find('"', i + 1);
      if (i == std::string::npos) break;
    } else if (text[i] == from) {
      ++depth;
    } else if (text[i] == to && --depth == 0) {
      return i;
    }
  }
  return std::string::npos;
}

uint32_t type_bytes(std::string_view type) {
  if (type == "b8" || type == "u8" || type == "s8") return 1;
  if (type == "b16" || type == "u16" || type == "s16" || type == "f16") return 2;
  if (type == "b64" || type == "u64" || type == "s64" || type == "f64") return 8;
  return 4;
}

// A variable declaration: ".param .align 8 .b8 name[24]", ".global .align 4 .u32 x = 3".
struct Declaration {
  std::string name;
  uint32_t align = 0;
  uint32_t element = 0;
  uint64_t count = 1;
  bool unsized = false;
  std::string initial;
};

Declaration parse_declaration(std::string_view text) {
  Declaration d;
  std::string body(text);
  const size_t equal = body.find('=');
  if (equal != std::string::npos) {
    d.initial = body.substr(equal + 1);
    body.resize(equal);
  }
  std::replace(body.begin(), body.end(), '[', ' ');
  const size_t close = body.find(']');
  std::istringstream words(body.substr(0, close));
  std::string word;
  bool named = false;
  d.unsized = close != std::string::npos;
  while (words >> word) {
    if (word == ".align") {
      words >> d.align;
    } else if (word == ".ptr") {
      std::string space;
      words >> space;
    } else if (word[0] == '.') {
      const uint32_t bytes = type_bytes(word.substr(1));
      if (word.size() <= 4 && std::isdigit(static_cast<unsigned char>(word[2]))) d.element = bytes;
    } else if (!named) {
      d.name = word;
      named = true;
    } else {
      d.count = std::strtoull(word.c_str(), nullptr, 0);
      d.unsized = false;
    }
  }
  if (d.element == 0) d.element = 4;
  d.align = std::max(d.align, d.element);
  return d;
}

class Scanner {
 public:
  Scanner(Module& module, std::string& error)
      : module_(module), text_(module.text), error_(error) {}

  bool run() {
    for (size_t at = 0; at < text_.size();) {
      if (!std::isspace(static_cast<unsigned char>(text_[at]))) {
        at = item(at);
        if (at == std::string::npos) return false;
      } else {
        ++at;
      }
    }
    return true;
  }

 private:
  bool starts(size_t at, const char* word) const {
    return text_.compare(at, std::strlen(word), word) == 0;
  }

  size_t line_end(size_t at) const { return std::min(text_.find('\n', at), text_.size()); }

  // One module-level item; returns the position behind it.
  size_t item(size_t at) {
    if (starts(at, ".version") || starts(at, ".address_size")) return line_end(at);
    if (starts(at, ".target")) {
      const size_t sm = text_.find("sm_", at);
      char* end = nullptr;
      module_.target = static_cast<int>(std::strtol(text_.c_str() + sm + 3, &end, 10));
      module_.specific = *end == 'a';
      return line_end(at);
    }
    if (starts(at, ".file")) return file(at);
    if (starts(at, ".section")) return matching(text_, text_.find('{', at), '{', '}') + 1;
    const size_t semicolon = text_.find(';', at);
    const size_t brace = text_.find('{', at);
    const size_t entry = text_.find(".entry", at);
    const size_t function = text_.find(".func", at);
    const size_t stop = std::min(semicolon, brace);
    if (entry < stop) return kernel(entry);
    if (function < stop) return skip_function(function);
    if (semicolon == std::string::npos) {
      error_ = module_.path + ": cannot read the PTX near '" + text_.substr(at, 40) + "'";
      return std::string::npos;
    }
    variable(std::string_view(text_).substr(at, semicolon - at));
    return semicolon + 1;
  }

  size_t file(size_t at) {
    const size_t end = line_end(at);
    const size_t open = text_.find('"', at);
    const size_t close = text_.find('"', open + 1);
    if (close < end)
      module_.files[std::atoi(text_.c_str() + at + 5)] = text_.substr(open + 1, close - open - 1);
    return end;
  }

  size_t skip_function(size_t at) {
    const size_t semicolon = text_.find(';', at);
    const size_t brace = text_.find('{', at);
    if (semicolon < brace) return semicolon + 1;
    return matching(text_, brace, '{', '}') + 1;
  }

  size_t kernel(size_t at) {
    auto kernel = std::make_unique<Kernel>();
    size_t name = at + 6;
    while (std::isspace(static_cast<unsigned char>(text_[name]))) ++name;
    size_t name_end = name;
    while (is_word(text_[name_end])) ++name_end;
    kernel->name = text_.substr(name, name_end - name);
    kernel->module = &module_;
    const size_t open = text_.find_first_of("({", name_end);
    size_t after = name_end;
    if (text_[open] == '(') {
      after = matching(text_, open, '(', ')') + 1;
      params(*kernel, text_.substr(open + 1, after - open - 2));
    }
    const size_t brace = text_.find('{', after);
    const size_t end = matching(text_, brace, '{', '}');
    if (end == std::string::npos) {
      error_ = module_.path + ": kernel " + kernel->name + " has no end";
      return end;
    }
    kernel->header = std::string_view(text_).substr(after, brace - after);
    kernel->body = std::string_view(text_).substr(brace + 1, end - brace - 1);
    kernel->body_line =
        1 + static_cast<int>(std::count(text_.begin(), text_.begin() + brace, '\n'));
    thread_limit(*kernel);
    launch_registers(*kernel);
    module_.kernels[kernel->name] = std::move(kernel);
    return end + 1;
  }

  static void thread_limit(Kernel& kernel) {
    for (const char* word : {".maxntid", ".reqntid"}) {
      const size_t at = kernel.header.find(word);
      if (at == std::string_view::npos) continue;
      std::string numbers(kernel.header.substr(at + 8));
      std::replace(numbers.begin(), numbers.end(), ',', ' ');
      std::istringstream in(numbers);
      uint32_t n = 1;
      kernel.max_threads = 1;
      while (in >> n) kernel.max_threads *= n;
    }
  }

  static uint32_t number_after(std::string_view header, std::string_view word) {
    const size_t at = header.find(word);
    if (at == std::string_view::npos) return 0;
    return static_cast<uint32_t>(
        std::strtoul(std::string(header.substr(at + word.size())).c_str(), nullptr, 10));
  }

  // What ptxas gives a thread of a kernel that uses setmaxnreg: all that its bounds leave.
  static void launch_registers(Kernel& kernel) {
    const bool bound = kernel.header.find(".maxntid") != std::string_view::npos ||
                       kernel.header.find(".reqntid") != std::string_view::npos;
    const uint32_t stated = number_after(kernel.header, ".maxnreg");
    const uint32_t blocks = std::max(number_after(kernel.header, ".minnctapersm"), 1u);
    if (stated != 0)
      kernel.launch_registers = stated;
    else if (bound)
      kernel.launch_registers = std::min(65536 / (kernel.max_threads * blocks) / 8 * 8, 256u);
  }

  static void params(Kernel& kernel, const std::string& list) {
    std::istringstream in(list);
    std::string one;
    while (std::getline(in, one, ',')) {
      if (one.find(".param") == std::string::npos) continue;
      const Declaration d = parse_declaration(one);
      kernel.param_bytes = (kernel.param_bytes + d.align - 1) / d.align * d.align;
      const uint32_t size = static_cast<uint32_t>(d.element * d.count);
      kernel.params.push_back({d.name, kernel.param_bytes, size});
      kernel.param_bytes += size;
    }
  }

  void variable(std::string_view text) {
    const Declaration d = parse_declaration(text);
    if (text.find(".shared") != std::string_view::npos) {
      module_.shared[d.name] = {d.align,
                                d.unsized ? 0 : static_cast<uint32_t>(d.element * d.count)};
      return;
    }
    if (text.find(".global") == std::string_view::npos &&
        text.find(".const") == std::string_view::npos)
      return;
    const size_t bytes = static_cast<size_t>(d.element) * d.count;
    module_.storage.push_back(std::make_unique<char[]>(bytes + 64));
    char* data = module_.storage.back().get();
    data += (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64;
    initialise(data, d);
    module_.globals[d.name] = reinterpret_cast<uint64_t>(data);
    module_.variables.push_back({d.name, reinterpret_cast<uint64_t>(data), bytes});
  }

  static void initialise(char* data, const Declaration& d) {
    std::string list = d.initial;
    for (char& c : list) {
      if (c == '{' || c == '}' || c == ',') c = ' ';
    }
    std::istringstream in(list);
    std::string value;
    for (uint64_t i = 0; i < d.count && in >> value; ++i) {
      uint64_t bits = 0;
      if (value.size() > 2 && value[0] == '0' && (value[1] == 'f' || value[1] == 'd')) {
        bits = std::strtoull(value.c_str() + 2, nullptr, 16);
      } else {
        bits = static_cast<uint64_t>(std::strtoll(value.c_str(), nullptr, 0));
      }
      std::memcpy(data + i * d.element, &bits, d.element);
    }
  }

  Module& module_;
  std::string& text_;
  std::string& error_;
};

}  // namespace

std::unique_ptr<Module> parse_module(const std::string& name, std::string text,
                                     std::string& error) {
  auto module = std::make_unique<Module>();
  module->path = name;
  module->text = std::move(text);
  blank_comments(module->text);
  if (!Scanner(*module, error).run()) return nullptr;
  if (module->target == 0) {
    error = name + " has no .target line: not PTX";
    return nullptr;
  }
  return module;
}

std::unique_ptr<Module> load_module(const std::string& path, std::string& error) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    error = "cannot open the PTX file " + path;
    return nullptr;
  }
  return parse_module(path, std::string(std::istreambuf_iterator<char>(in), {}), error);
}

}  // namespace ptx
