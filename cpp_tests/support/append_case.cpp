#include "append_case.h"

#include <algorithm>
#include <cmath>

#include "check.h"

namespace flashtile::test {

namespace {

// Two products and a sum in fp32 or fp64, one rounding to 16 bits; times the largest number.
double rotation_unit(Dtype dtype) {
  return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64 ? 3 * epsilon_of(dtype)
                                                              : epsilon_of(dtype);
}

}  // namespace

RotaryTable::RotaryTable(Dtype dtype, int64_t rows, int dim, uint32_t flags, int padding)
    : cos(dtype, {1, rows, 1, dim / 2}, Strides{0, dim / 2 + padding, 0}, 0),
      sin(dtype, {1, rows, 1, dim / 2}, Strides{0, dim / 2 + padding, 0}, 0),
      dim(dim),
      flags(flags) {
  cos.for_each([&](int64_t b, int64_t p, int64_t h, int64_t d) {
    const double angle =
        static_cast<double>(p) * std::pow(10000.0, -2.0 * static_cast<double>(d) / dim);
    cos.set(b, p, h, d, std::cos(angle));
    sin.set(b, p, h, d, std::sin(angle));
  });
}

std::pair<double, double> RotaryTable::rotated(const HostTensor& x, int64_t b, int64_t s, int64_t h,
                                               int64_t d, int64_t position) const {
  const double itself = x.get(b, s, h, d);
  if (d >= dim) return {itself, 0.0};
  const bool halves = (flags & FLASHTILE_ROTARY_HALVES) != 0;
  const int64_t pair = halves ? d % (dim / 2) : d / 2;
  const bool second = halves ? d >= dim / 2 : d % 2 == 1;
  const int64_t partner = halves ? (second ? d - dim / 2 : d + dim / 2) : d ^ 1;
  const double other = x.get(b, s, h, partner);
  const double c = cos.get(0, position, 0, pair), sn = sin.get(0, position, 0, pair);
  return {itself * c + (second ? other : -other) * sn,
          std::max(std::fabs(itself), std::fabs(other))};
}

const int32_t* Mirror::ints(const std::vector<int32_t>& values) {
  return reinterpret_cast<const int32_t*>(
      copy(values.data(), values.size() * sizeof(int32_t), nullptr));
}

flashtile_tensor Mirror::tensor(HostTensor& host) {
  uint8_t* const data = copy(host.bytes().data(), host.bytes().size(), host.bytes().data());
  return {data == nullptr ? nullptr : data + host.start_byte(), host.strides().batch,
          host.strides().seq, host.strides().head};
}

void Mirror::copy_in() const {
  for (const Copy& c : copies_) backend_.copy_in(c.memory.data(), c.from, c.bytes);
}

void Mirror::copy_out() const {
  for (const Copy& c : copies_) {
    if (c.to != nullptr) c.memory.copy_out(c.to);
  }
}

uint8_t* Mirror::copy(const void* from, size_t bytes, void* to) {
  if (bytes == 0) return nullptr;
  return copies_.emplace_back(backend_, from, bytes, to).memory.data();
}

flashtile_problem mirrored(Mirror& mirror, const Backend& backend, const CacheCall& call,
                           flashtile_problem problem) {
  const auto move = [&](const int32_t*& pointer, const std::vector<int32_t>& values) {
    if (pointer != nullptr) pointer = mirror.ints(values);
  };
  problem.device = backend.device;
  problem.device_index = backend.device_index;
  move(problem.seqused_k, call.lengths);
  move(problem.cache_leftpad, call.leftpads);
  move(problem.block_table, call.table);
  move(problem.cache_batch_idx, call.batch_idx);
  move(problem.cu_seqlens_q, call.cu_q);
  move(problem.cu_seqlens_new, call.cu_new);
  return problem;
}

flashtile_append_kv_params append_params(Mirror& mirror, Appending& what,
                                         const flashtile_problem& problem) {
  flashtile_append_kv_params params;
  flashtile_append_kv_init(&params);
  params.problem = &problem;
  params.k_new = mirror.tensor(what.call.k_new);
  params.v_new = mirror.tensor(what.call.v_new);
  params.k_cache = mirror.tensor(what.call.k);
  params.v_cache = mirror.tensor(what.call.v);
  if (!what.table.has_value()) return params;
  RotaryTable& table = *what.table;
  params.rotary_cos = mirror.tensor(table.cos).data;
  params.rotary_sin = mirror.tensor(table.sin).data;
  params.rotary_stride = table.cos.strides().seq;
  params.rotary_rows = table.cos.extents().seq;
  params.rotary_dim = table.dim;
  params.rotary_flags = table.flags;
  params.q = mirror.tensor(what.call.q);
  params.q_out = what.in_place ? params.q : mirror.tensor(what.q_out);
  return params;
}

std::string append_on(const Backend& backend, Appending& what, const flashtile_problem& problem) {
  Mirror mirror(backend);
  const flashtile_problem moved = mirrored(mirror, backend, what.call, problem);
  const flashtile_append_kv_params params = append_params(mirror, what, moved);
  const flashtile_status status = flashtile_append_kv(&params, nullptr);
  mirror.copy_out();
  return status == FLASHTILE_OK ? "" : flashtile_last_error();
}

std::string append_on_cpu(Appending& what, const flashtile_problem& problem) {
  return append_on(cpu_backend(), what, problem);
}

CacheBackend cpu_cache_backend() {
  return {append_on_cpu,
          [](CacheCall& call, const flashtile_problem& problem) { return call.run(problem); },
          /*reads_numbers=*/true};
}

PossibleRows expect_possible_rows(const CacheCall& call, const flashtile_problem& problem,
                                  HostTensor& k, HostTensor& v) {
  PossibleRows rows;
  const int64_t size = problem.page_size;
  const int64_t columns = problem.block_table != nullptr ? problem.max_blocks : 1;
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t r = 0; r < problem.seqlen_new; ++r) {
      const int64_t length = call.lengths[static_cast<size_t>(b)], row = length + r;
      if (length < 0) break;
      int64_t page = -1;
      if (row < columns * size) {
        const int64_t entry = b * problem.block_table_stride + row / size;
        page = problem.block_table != nullptr       ? call.table[static_cast<size_t>(entry)]
               : problem.cache_batch_idx != nullptr ? call.batch_idx[static_cast<size_t>(b)]
                                                    : b;
      }
      if (page < 0 || page >= problem.num_pages) {
        ++rows.without_place;
        continue;
      }
      rows.places.push_back(page * size + row % size);
      for (int64_t h = 0; h < problem.num_heads_kv; ++h) {
        for (int64_t d = 0; d < problem.head_dim; ++d)
          k.set(page, row % size, h, d, call.k_new.get(b, r, h, d));
        for (int64_t d = 0; d < problem.head_dim_v; ++d)
          v.set(page, row % size, h, d, call.v_new.get(b, r, h, d));
      }
    }
  }
  return rows;
}

void expect_rows(const CacheCall& call, HostTensor& k, HostTensor& v) {
  for (size_t b = 0; b < call.spec().sequences.size(); ++b) {
    const CacheSequence& s = call.spec().sequences[b];
    for (int64_t i = 0; i < s.added; ++i) {
      const auto [page, row] = call.place_of(b, s.leftpad + s.keys + i);
      const int64_t batch = call.spec().packed ? 0 : static_cast<int64_t>(b);
      const int64_t from = call.spec().packed ? call.cu_new[b] + i : i;
      for (int64_t h = 0; h < k.extents().heads; ++h) {
        for (int64_t d = 0; d < k.extents().dim; ++d)
          k.set(page, row, h, d, call.k_new.get(batch, from, h, d));
        for (int64_t d = 0; d < v.extents().dim; ++d)
          v.set(page, row, h, d, call.v_new.get(batch, from, h, d));
      }
    }
  }
}

void check_append(const CacheSpec& spec, const AppendRun& run) {
  Appending what = {CacheCall(spec)};
  HostTensor k = what.call.k, v = what.call.v;
  expect_rows(what.call, k, v);
  HostTensor v_new(spec.of_keys(), what.call.v_new.extents(), Layout::kHeadMajor);
  v_new.for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
    v_new.set(b, s, h, d, what.call.v_new.get(b, s, h, d));
  });
  what.call.v_new = std::move(v_new);  // its heads are not as far apart as the cache's
  CHECK_EQ(run(what, what.call.problem()), std::string());
  CHECK_MESSAGE(what.call.k.bytes() == k.bytes(), spec.name() + ": k");
  CHECK_MESSAGE(what.call.v.bytes() == v.bytes(), spec.name() + ": v");
}

double rotation_error(const CacheCall& before, const RotaryTable& table, Appending& what) {
  const CacheSpec& spec = before.spec();
  double worst = 0.0;
  const auto compare = [&](double got, const std::pair<double, double>& expected) {
    const double error = std::fabs(got - expected.first);
    const double allowed = rotation_unit(spec.dtype) * expected.second;
    worst = std::max(worst, error == 0.0 ? 0.0 : !(error <= allowed) ? kInfinity : error / allowed);
  };
  for (size_t b = 0; b < spec.sequences.size(); ++b) {
    const CacheSequence& s = spec.sequences[b];
    const int64_t first = s.leftpad + s.keys, batch = spec.packed ? 0 : static_cast<int64_t>(b);
    for (int64_t i = 0; i < s.added; ++i) {
      const auto [page, row] = before.place_of(b, first + i);
      const int64_t from = spec.packed ? before.cu_new[b] + i : i;
      for (int64_t h = 0; h < spec.heads_kv; ++h) {
        for (int64_t d = 0; d < spec.dims.qk; ++d)
          compare(what.call.k.get(page, row, h, d),
                  table.rotated(before.k_new, batch, from, h, d, first + i));
      }
    }
    for (int64_t i = 0; i < s.queries; ++i) {
      const int64_t from = spec.packed ? before.cu_q[b] + i : i;
      const int64_t position = first + ((table.flags & FLASHTILE_ROTARY_Q_FIXED) != 0 ? 0 : i);
      for (int64_t h = 0; h < spec.heads; ++h) {
        for (int64_t d = 0; d < spec.dims.qk; ++d)
          compare(what.rotated_q().get(batch, from, h, d),
                  table.rotated(before.q, batch, from, h, d, position));
      }
    }
  }
  return worst;
}

void check_rotation(const CacheSpec& spec, const RotaryTable& table, const AppendRun& run) {
  const CacheCall before(spec);
  HostTensor v = before.v, unused = before.k;
  expect_rows(before, unused, v);
  for (const bool in_place : {false, true}) {
    Appending what = {before, table, HostTensor(spec.dtype, before.q.extents(), spec.layout_k),
                      in_place};
    CHECK_EQ(run(what, what.call.problem()), std::string());
    CHECK(what.q_out.gaps_are_untouched() && what.call.q.gaps_are_untouched());
    CHECK(what.call.k.gaps_are_untouched());
    CHECK(what.call.v.bytes() == v.bytes());
    const double worst = rotation_error(before, table, what);
    CHECK_MESSAGE(worst <= 1.0, spec.name() + " rotary_dim " + std::to_string(table.dim) +
                                    " flags " + std::to_string(table.flags) + ": " +
                                    std::to_string(worst));
  }
}

void check_missing_angles(Dtype dtype, const AppendRun& run) {
  const CacheSpec spec = {.dtype = dtype,
                          .sequences = {{.seed = 1, .keys = 9, .queries = 3, .added = 3}}};
  Appending what = {CacheCall(spec), RotaryTable(dtype, 10, 64, 0)};
  HostTensor& q_out = what.q_out;
  q_out = HostTensor(dtype, what.call.q.extents(), Layout::kPadded);
  q_out.for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) { q_out.set(b, s, h, d, 7.0); });
  CHECK_EQ(run(what, what.call.problem()), std::string());
  for (int64_t i = 0; i < 3; ++i) {
    const auto [page, row] = what.call.place_of(0, 9 + i);
    CHECK_EQ(std::isnan(what.call.k.get(page, row, 0, 0)), i > 0);
    CHECK_EQ(std::isnan(what.call.v.get(page, row, 0, 0)), i > 0);
    for (int64_t d = 0; d < 64; ++d) {
      CHECK_EQ(std::isnan(q_out.get(0, i, 0, d)), i > 0);
      CHECK_EQ(std::isnan(q_out.get(0, i, 1, d)), i > 0);
    }
  }
  CHECK(q_out.gaps_are_untouched());
}

}  // namespace flashtile::test
