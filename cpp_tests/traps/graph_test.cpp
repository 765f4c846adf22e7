// One capture of an append, of the check and of attention over the cache, replayed with other
// lengths, other pages and longer sequences: everything that may change lies on the device. A test
// is a process, so the first calls of all are captured, on a GPU on a stream of their own. The
// machine, which has no graphs, repeats the calls.
#include <algorithm>

#include "../kernels/device.h"
#include "../support/append_case.h"
#include "../support/check.h"

using namespace flashtile::test;

namespace {

// Sequences of any lengths up to 100 rows: all have tensors of the same shape.
CacheSpec spec_of(const std::vector<int>& keys, uint64_t layout_seed) {
  CacheSpec spec = {.dtype = Dtype::kBFloat16,
                    .heads = 4,
                    .heads_kv = 2,
                    .page_size = 16,
                    .layout_seed = layout_seed};
  uint64_t seed = 1;
  for (const int count : keys)
    spec.sequences.push_back({.seed = seed++, .keys = count, .queries = 2, .added = 2});
  spec.sequences.push_back({.seed = seed, .keys = 98, .queries = 2, .added = 2});
  return spec;
}

const std::vector<CacheSpec>& specs() {
  static const std::vector<CacheSpec> all = {spec_of({3, 20}, 1), spec_of({90, 0}, 2),
                                             spec_of({15, 98}, 3)};
  return all;
}

// The contents of another call of the same shape, where `to` has its own.
void replace(CacheCall& to, CacheCall from) {
  const auto columns = static_cast<size_t>(from.problem().max_blocks);
  const auto stride = static_cast<size_t>(from.problem().block_table_stride);
  const auto own_stride = static_cast<size_t>(to.problem().block_table_stride);
  for (size_t b = 0; b < from.lengths.size(); ++b) {
    for (size_t i = 0; i < columns; ++i) to.table[b * own_stride + i] = from.table[b * stride + i];
  }
  std::copy(from.lengths.begin(), from.lengths.end(), to.lengths.begin());
  std::copy(from.leftpads.begin(), from.leftpads.end(), to.leftpads.begin());
  for (HostTensor CacheCall::* const tensor :
       {&CacheCall::q, &CacheCall::k, &CacheCall::v, &CacheCall::k_new, &CacheCall::v_new}) {
    const std::vector<uint8_t>& bytes = (from.*tensor).bytes();
    CHECK_EQ(bytes.size(), (to.*tensor).bytes().size());
    std::copy(bytes.begin(), bytes.end(), (to.*tensor).bytes().begin());
  }
}

// All but the problem, the cache and the workspace.
flashtile_forward_params forward_params(Mirror& mirror, CacheCall& call, HostTensor& out,
                                        HostTensor& lse) {
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.q = mirror.tensor(call.q);
  params.out = mirror.tensor(out);
  params.softmax_lse = static_cast<float*>(mirror.tensor(lse).data);
  params.lse_stride_batch = lse.strides().batch;
  params.lse_stride_head = lse.strides().head;
  return params;
}

void check_schedule(const Schedule& schedule) {
  const Backend backend = cuda_backend();
  begin(schedule);
  Appending what = {CacheCall(specs().front())};
  CacheCall& call = what.call;
  Mirror mirror(backend);
  const flashtile_problem problem = mirrored(mirror, backend, call, call.problem());
  const flashtile_append_kv_params append = append_params(mirror, what, problem);
  flashtile_cache_report report = {};
  const DeviceBytes report_memory(backend, &report, sizeof report);
  auto* const reported = reinterpret_cast<flashtile_cache_report*>(report_memory.data());

  const std::function<void()> replay = captured([&](CUstream_st* stream) {
    CHECK_EQ(flashtile_check_cache(&problem, reported, stream), FLASHTILE_OK);
    CHECK_EQ(flashtile_append_kv(&append, stream), FLASHTILE_OK);
  });
  for (const CacheSpec& spec : specs()) {
    replace(call, CacheCall(spec));
    HostTensor k = call.k, v = call.v;
    expect_rows(CacheCall(spec), k, v);
    mirror.copy_in();
    replay();
    mirror.copy_out();
    CHECK(call.k.bytes() == k.bytes());
    CHECK(call.v.bytes() == v.bytes());
  }
  call.lengths[1] = 2000;
  mirror.copy_in();
  replay();
  report_memory.copy_out(&report);
  CHECK_EQ(report.what != 0 ? report.value : -1, int64_t{2000});
  CHECK_EQ(finish(), std::string());
}

void check_attention(const Schedule& schedule) {
  const Backend backend = cuda_backend();
  begin(schedule);
  Appending what = {CacheCall(specs().front())};
  CacheCall& call = what.call;
  Mirror mirror(backend);
  const flashtile_problem problem = mirrored(mirror, backend, call, call.problem());
  const flashtile_append_kv_params append = append_params(mirror, what, problem);
  HostTensor out(Dtype::kBFloat16, {3, 2, 4, 64}, Layout::kOdd);
  HostTensor lse = make_row_tensor(call.q.extents(), call.spec().dtype);
  flashtile_forward_params forward = forward_params(mirror, call, out, lse);
  forward.problem = &problem;
  forward.k = append.k_cache;
  forward.v = append.v_cache;
  CHECK_EQ(flashtile_workspace_size(&forward, &forward.workspace_bytes), FLASHTILE_OK);
  const std::vector<uint8_t> poison(forward.workspace_bytes, kPoison);
  const DeviceBytes workspace(backend, poison.data(), poison.size());
  forward.workspace = workspace.data();

  const std::function<void()> replay = captured([&](CUstream_st* stream) {
    CHECK_EQ(flashtile_append_kv(&append, stream), FLASHTILE_OK);
    CHECK_EQ(flashtile_forward(&forward, stream), FLASHTILE_OK);
  });
  for (const CacheSpec& spec : specs()) {
    CacheCall expected(spec);
    replace(call, expected);
    mirror.copy_in();
    replay();
    mirror.copy_out();
    CHECK_EQ(expected.append(), std::string());
    CacheResult result;
    result.out = out.dense();
    result.lse = lse.dense();
    check_cache_result(expected, result);
  }
  CHECK_EQ(finish(), std::string());
}

}  // namespace

TEST("G2 the first calls are captured: an append and a check, replayed with other lengths") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  for (const Schedule& schedule : schedules()) check_schedule(schedule);
}

TEST("G3 a captured append and attention, replayed with longer sequences and other pages") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  for (const Schedule& schedule : schedules()) check_attention(schedule);
}
