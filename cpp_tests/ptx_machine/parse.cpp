// Statements of a kernel body. Registers and labels are scoped by braces (inline asm repeats
// names).
#include "parse.h"

#include <cctype>
#include <cstdlib>

namespace ptx {

namespace {

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }
bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }
bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

std::string_view trim(std::string_view s) {
  while (!s.empty() && is_space(s.front())) s.remove_prefix(1);
  while (!s.empty() && is_space(s.back())) s.remove_suffix(1);
  return s;
}

// "0x1F", "-5", "0f3F800000", "0d...", "5U".
bool parse_number(std::string_view text, uint64_t& bits) {
  const std::string s(text);
  if (s.empty()) return false;
  char* end = nullptr;
  if (s.size() == 10 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) {
    bits = std::strtoull(s.c_str() + 2, &end, 16);
    return *end == '\0';
  }
  if (s.size() == 18 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) {
    bits = std::strtoull(s.c_str() + 2, &end, 16);
    return *end == '\0';
  }
  if (s[0] == '-') {
    bits = static_cast<uint64_t>(std::strtoll(s.c_str(), &end, 0));
  } else if (is_digit(s[0])) {
    bits = std::strtoull(s.c_str(), &end, 0);
  } else {
    return false;
  }
  return *end == '\0' || ((*end == 'U' || *end == 'u') && end[1] == '\0');
}

class Parser {
 public:
  explicit Parser(const Kernel& kernel) : text_(kernel.body), line_(kernel.body_line) {
    out_.scope_parent.push_back(-1);
    names_.emplace_back();
    ranges_.emplace_back();
    scopes_.push_back(0);
  }

  ParsedBody run() {
    while (out_.error.empty() && skip_space()) statement();
    return std::move(out_);
  }

 private:
  struct Range {  // .reg .b32 %r<100>
    int first = 0;
    int count = 0;
  };

  void fail(const std::string& text) {
    if (!out_.error.empty()) return;
    out_.error = text;
    out_.error_line = line_;
  }

  bool skip_space() {
    while (at_ < text_.size() && is_space(text_[at_])) {
      if (text_[at_] == '\n') ++line_;
      ++at_;
    }
    return at_ < text_.size();
  }

  std::string_view take_until(char stop) {
    const size_t begin = at_;
    while (at_ < text_.size() && text_[at_] != stop) {
      if (text_[at_] == '\n') ++line_;
      ++at_;
    }
    const std::string_view taken = text_.substr(begin, at_ - begin);
    if (at_ < text_.size()) {
      if (stop == '\n') ++line_;
      ++at_;
    }
    return taken;
  }

  void statement() {
    const char c = text_[at_];
    if (c == ';') {
      ++at_;
    } else if (c == '{') {
      ++at_;
      out_.scope_parent.push_back(scopes_.back());
      scopes_.push_back(static_cast<int>(out_.scope_parent.size()) - 1);
      names_.emplace_back();
      ranges_.emplace_back();
    } else if (c == '}') {
      ++at_;
      if (scopes_.size() < 2) return fail("unbalanced braces");
      scopes_.pop_back();
      names_.pop_back();
      ranges_.pop_back();
    } else if (text_.compare(at_, 4, ".loc") == 0 && is_space(text_[at_ + 4])) {
      location(take_until('\n'));
    } else {
      label_or_statement();
    }
  }

  void label_or_statement() {
    size_t end = at_;
    while (end < text_.size() && is_word(text_[end])) ++end;
    size_t colon = end;
    while (colon < text_.size() && is_space(text_[colon])) ++colon;
    const bool label = end > at_ && colon + 1 < text_.size() && text_[colon] == ':' &&
                       text_[colon + 1] != ':' && text_[at_] != '.';
    if (label) {
      const std::string_view name = text_.substr(at_, end - at_);
      while (at_ <= colon) {
        if (text_[at_] == '\n') ++line_;
        ++at_;
      }
      skip_space();
      if (text_.compare(at_, 14, ".branchtargets") == 0) {
        at_ += 14;
        out_.branch_targets[name] = split(take_until(';'));
      } else {
        out_.labels[{scopes_.back(), name}] = static_cast<int>(out_.code.size());
      }
      return;
    }
    const int line = line_;
    const std::string_view text = trim(take_until(';'));
    if (text.empty()) return;
    if (text[0] == '.') return directive(text);
    instruction(text, line);
  }

  // .loc file line column[, function_name label[+n], inlined_at file line column]
  void location(std::string_view text) {
    const std::string s(text);
    char* next = nullptr;
    Site site;
    site.file = static_cast<int>(std::strtol(s.c_str() + 4, &next, 10));
    site.line = static_cast<int>(std::strtol(next, &next, 10));
    if (site.line == 0) return;  // moved code: the place before it says more
    site_ = site;
    const size_t inlined = s.find("inlined_at");
    if (inlined == std::string::npos) {
      callers_[{site_.file, site_.line}] = {0, 0};
      return;
    }
    const int file = static_cast<int>(std::strtol(s.c_str() + inlined + 10, &next, 10));
    const int line = static_cast<int>(std::strtol(next, &next, 10));
    const auto outer = callers_.find({file, line});
    const bool chained = outer != callers_.end() && outer->second.first != 0;
    const std::pair<int, int> caller = chained ? outer->second : std::pair<int, int>(file, line);
    callers_[{site_.file, site_.line}] = caller;
    site_.outer_file = caller.first;
    site_.outer_line = caller.second;
  }

  // Splits at commas outside of brackets.
  static std::vector<std::string_view> split(std::string_view text) {
    std::vector<std::string_view> parts;
    int depth = 0;
    size_t begin = 0;
    for (size_t i = 0; i <= text.size(); ++i) {
      const char c = i < text.size() ? text[i] : ',';
      if (c == '{' || c == '[' || c == '(') ++depth;
      if (c == '}' || c == ']' || c == ')') --depth;
      if (i == text.size() || (c == ',' && depth == 0)) {
        const std::string_view part = trim(text.substr(begin, i - begin));
        if (!part.empty()) parts.push_back(part);
        begin = i + 1;
      }
    }
    return parts;
  }

  void directive(std::string_view text) {
    if (text.substr(0, 4) == ".reg") return registers(text.substr(4));
    if (text.substr(0, 7) == ".pragma" || text.substr(0, 6) == ".param") return;
    if (text.substr(0, 7) == ".shared") return variable(text.substr(7), out_.shared);
    if (text.substr(0, 6) == ".local") return variable(text.substr(6), out_.local);
    fail("unknown directive '" + std::string(text.substr(0, 60)) + "'");
  }

  void registers(std::string_view text) {
    text = trim(text);
    const size_t space = text.find_first_of(" \t\n");
    const std::string_view type = text.substr(0, space);
    RegisterClass width = RegisterClass::k32;
    if (type == ".pred") {
      width = RegisterClass::kPred;
    } else if (type == ".b16" || type == ".u16" || type == ".s16" || type == ".f16") {
      width = RegisterClass::k16;
    } else if (type == ".b64" || type == ".u64" || type == ".s64" || type == ".f64") {
      width = RegisterClass::k64;
    } else if (type != ".b32" && type != ".u32" && type != ".s32" && type != ".f32" &&
               type != ".f16x2") {
      return fail("unknown register type '" + std::string(type) + "'");
    }
    for (std::string_view name : split(text.substr(space))) {
      const int first = static_cast<int>(out_.registers.size());
      const size_t angle = name.find('<');
      if (angle == std::string_view::npos) {
        out_.registers.push_back(width);
        names_.back()[name] = first;
        continue;
      }
      const int count = std::atoi(std::string(name.substr(angle + 1)).c_str());
      out_.registers.insert(out_.registers.end(), count, width);
      ranges_.back()[trim(name.substr(0, angle))] = {first, count};
    }
  }

  // ".align 4 .b8 name[512]"
  void variable(std::string_view text, std::map<std::string, ParsedBody::Variable>& table) {
    ParsedBody::Variable v;
    std::string name;
    uint32_t element = 4;
    uint64_t count = 1;
    std::string word;
    const std::string s = std::string(text) + " ";
    for (size_t i = 0; i < s.size(); ++i) {
      if (!is_space(s[i])) {
        word += s[i];
        continue;
      }
      if (word.empty()) continue;
      if (word == ".align") {
        v.align = static_cast<uint32_t>(std::atoi(s.c_str() + i));
        while (is_space(s[i])) ++i;
        while (is_digit(s[i])) ++i;
      } else if (word[0] == '.') {
        element = static_cast<uint32_t>(std::atoi(word.c_str() + 2)) / 8;
      } else {
        const size_t bracket = word.find('[');
        if (bracket != std::string::npos)
          count = std::strtoull(word.c_str() + bracket + 1, nullptr, 0);
        name = word.substr(0, bracket);
      }
      word.clear();
    }
    v.align = std::max(v.align, element);
    v.bytes = static_cast<uint32_t>(element * count);
    table[name] = v;
  }

  int find_register(std::string_view name) const {
    size_t digits = name.size();
    while (digits > 0 && is_digit(name[digits - 1])) --digits;
    const std::string_view prefix = name.substr(0, digits);
    const int number =
        digits < name.size() ? std::atoi(std::string(name.substr(digits)).c_str()) : -1;
    for (size_t i = names_.size(); i-- > 0;) {
      const auto exact = names_[i].find(name);
      if (exact != names_[i].end()) return exact->second;
      const auto range = ranges_[i].find(prefix);
      if (number >= 0 && range != ranges_[i].end() && number < range->second.count) {
        return range->second.first + number;
      }
    }
    return -1;
  }

  void operand(std::string_view text, RawInst& inst) {
    text = trim(text);
    if (text.empty()) return fail("empty operand");
    if (text.front() == '{' || text.front() == '(') {
      for (std::string_view part : split(text.substr(1, text.size() - 2))) operand(part, inst);
      return;
    }
    RawOperand o;
    if (text.front() == '[') {
      // "[%rd1, {%r1, %r2}]" is an address and the coordinates in its tensor.
      const std::vector<std::string_view> parts = split(text.substr(1, text.size() - 2));
      if (parts.empty()) return fail("empty address");
      address(parts[0], o);
      inst.operands.push_back(o);
      for (size_t i = 1; i < parts.size(); ++i) operand(parts[i], inst);
      return;
    }
    const size_t bar = text.find('|');
    if (bar != std::string_view::npos) {
      operand(text.substr(0, bar), inst);
      operand(text.substr(bar + 1), inst);
      return;
    }
    if (text.front() == '!') {
      o.negated = true;
      text = trim(text.substr(1));
    }
    plain(text, o);
    inst.operands.push_back(o);
  }

  void plain(std::string_view text, RawOperand& o) {
    o.reg = find_register(text);
    if (o.reg >= 0) {
      o.kind = RawOperand::kRegister;
    } else if (text == "_") {
      o.kind = RawOperand::kSink;
    } else if (text == "WARP_SZ") {
      o.kind = RawOperand::kImmediate;
      o.bits = 32;
    } else if (parse_number(text, o.bits)) {
      o.kind = RawOperand::kImmediate;
    } else if (is_digit(text.front()) || text.front() == '-') {
      o.kind = RawOperand::kFloat;
      o.number = std::atof(std::string(text).c_str());
    } else {
      o.kind = text.front() == '%' ? RawOperand::kSpecial : RawOperand::kName;
      o.name = text;
    }
  }

  // "%rd1", "%rd1+16", "%rd1+-8", "symbol+4", "128"
  void address(std::string_view text, RawOperand& o) {
    o.kind = RawOperand::kAddress;
    const size_t plus = text.find('+');
    const std::string_view base = trim(text.substr(0, plus));
    if (plus != std::string_view::npos && !parse_number(trim(text.substr(plus + 1)), o.bits)) {
      return fail("cannot read the address [" + std::string(text) + "]");
    }
    o.reg = find_register(base);
    if (o.reg < 0 && !parse_number(base, o.bits)) o.name = base;
  }

  void instruction(std::string_view text, int line) {
    RawInst inst;
    inst.site = site_;
    inst.site.ptx_line = line;
    inst.scope = scopes_.back();
    if (text.front() == '@') {
      size_t end = 1;
      while (end < text.size() && !is_space(text[end])) ++end;
      inst.guard_negated = text[1] == '!';
      const std::string_view name =
          text.substr(inst.guard_negated ? 2 : 1, end - (inst.guard_negated ? 2 : 1));
      inst.guard = find_register(name);
      if (inst.guard < 0) return fail("unknown predicate '" + std::string(name) + "'");
      text = trim(text.substr(end));
    }
    size_t end = 0;
    while (end < text.size() && !is_space(text[end])) ++end;
    inst.opcode = text.substr(0, end);
    inst.site.opcode = inst.opcode;
    for (std::string_view part : split(text.substr(end))) operand(part, inst);
    out_.code.push_back(std::move(inst));
  }

  std::string_view text_;
  size_t at_ = 0;
  int line_ = 0;
  Site site_;
  std::map<std::pair<int, int>, std::pair<int, int>> callers_;  // (file, line) -> outermost caller
  std::vector<int> scopes_;
  std::vector<std::unordered_map<std::string_view, int>> names_;
  std::vector<std::unordered_map<std::string_view, Range>> ranges_;
  ParsedBody out_;
};

}  // namespace

int ParsedBody::find_label(int scope, std::string_view name) const {
  for (; scope >= 0; scope = scope_parent[scope]) {
    const auto it = labels.find({scope, name});
    if (it != labels.end()) return it->second;
  }
  return -1;
}

ParsedBody parse_body(const Kernel& kernel) { return Parser(kernel).run(); }

}  // namespace ptx
