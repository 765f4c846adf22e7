#include "runner.h"

#include <algorithm>
#include <cstdint>

#include "numbers_of_problem.h"

namespace flashtile::test {

Run::Run(const Setup& setup, const Backend& backend)
    : setup_(setup),
      backend_(backend),
      cu_q_(backend, setup.cu_seqlens_q.data(), setup.cu_seqlens_q.size() * sizeof(int32_t)),
      cu_k_(backend, setup.cu_seqlens_k.data(), setup.cu_seqlens_k.size() * sizeof(int32_t)),
      used_q_(backend, setup.used_q.data(), setup.used_q.size() * sizeof(int32_t)),
      used_k_(backend, setup.used_k.data(), setup.used_k.size() * sizeof(int32_t)),
      block_table_(backend, setup.block_table.data(), setup.block_table.size() * sizeof(int32_t)),
      leftpad_(backend, setup.leftpad.data(), setup.leftpad.size() * sizeof(int32_t)),
      q_(backend, setup.q),
      k_(backend, setup.k),
      v_(backend, setup.v),
      dout_(backend, setup.dout),
      dlse_(backend, setup.dlse),
      lse_(backend, make_row_tensor(setup.extents_q, setup.dtype)),
      out_(backend, make_tensor(setup, Role::kOut, setup.extents_out)),
      dq_(backend, make_tensor(setup, Role::kGradient, setup.extents_q, 0)),
      dk_(backend, make_tensor(setup, Role::kGradient, setup.extents_k, 1)),
      dv_(backend, make_tensor(setup, Role::kGradient, setup.extents_v, 2)),
      scores_(setup, backend) {
  fill_problem();
  fill_params();
}

Run::Refusals Run::refusals() {
  char why[256] = "";
  Refusals said;
  const bool forward_refused = flashtile_can_run(&forward_, why, sizeof why) != FLASHTILE_OK;
  said.forward = forward_refused ? checked_refusal(flashtile_forward(&forward_, nullptr), why) : "";
  const bool backward_refused =
      flashtile_can_run_backward(&backward_, why, sizeof why) != FLASHTILE_OK;
  said.backward =
      backward_refused ? checked_refusal(flashtile_backward(&backward_, nullptr), why) : "";
  for (DeviceTensor* output : {&out_, &lse_, &dq_, &dk_, &dv_}) {
    if (!output->fetch().is_all_poison()) said.forward += " (and something was written)";
  }
  return said;
}

RunResult Run::operator()() {
  forward();
  if (result_.error.empty() && !setup_.forward_only()) backward();
  return result_;
}

RunResult Run::forward() {
  char name[128] = "";
  size_t bytes = 0;
  if (!ok(flashtile_workspace_size(&forward_, &bytes))) return result_;
  const std::vector<uint8_t> poison(bytes, kPoison);
  const DeviceBytes workspace(backend_, poison.data(), bytes);
  forward_.workspace = workspace.data();
  forward_.workspace_bytes = bytes;
  if (!ok(flashtile_plan(&forward_, name, sizeof name))) return result_;
  result_.forward_plan = name;
  if (!ok(flashtile_forward(&forward_, nullptr))) return result_;
  result_.values.out = fetch(out_, "out");
  result_.values.lse = fetch(lse_, "softmax_lse");
  result_.error += scores_.fetch_forward(result_.scores);
  return result_;
}

RunResult Run::backward(const std::function<void(void* dout)>& before) {
  char name[128] = "";
  size_t bytes = 0;
  if (!ok(flashtile_workspace_size_backward(&backward_, &bytes))) return result_;
  const std::vector<uint8_t> poison(bytes, kPoison);
  const DeviceBytes workspace(backend_, poison.data(), bytes);
  backward_.workspace = workspace.data();
  backward_.workspace_bytes = bytes;
  if (!ok(flashtile_plan_backward(&backward_, name, sizeof name))) return result_;
  result_.backward_plan = name;
  if (before != nullptr) before(dout_.bytes.data());
  if (!ok(flashtile_backward(&backward_, nullptr))) return result_;
  result_.values.dq = fetch(dq_, "dq");
  result_.values.dk = fetch(dk_, "dk");
  result_.values.dv = fetch(dv_, "dv");
  result_.error += scores_.fetch_backward(result_.scores);
  return result_;
}

bool Run::ok(flashtile_status status) {
  if (status != FLASHTILE_OK) result_.error = flashtile_last_error();
  return status == FLASHTILE_OK;
}

std::string Run::checked_refusal(flashtile_status status, const std::string& why) {
  if (status == FLASHTILE_OK) return why + " (and yet it ran)";
  const std::string said = flashtile_last_error();
  return said == why ? said : why + " (the call says: " + said + ")";
}

std::vector<double> Run::fetch(DeviceTensor& tensor, const char* name) {
  if (!tensor.fetch().gaps_are_untouched())
    result_.error += std::string(name) + ": written outside the tensor; ";
  return tensor.host.dense();
}

void Run::fill_problem() {
  flashtile_problem_init(&problem_);
  problem_.device = backend_.device;
  problem_.device_index = backend_.device_index;
  problem_.batch = setup_.batch;
  problem_.num_heads = setup_.extents_q.heads;
  problem_.num_heads_kv = setup_.extents_k.heads;
  problem_.head_dim = setup_.head_dim;
  problem_.head_dim_v = setup_.head_dim_v;
  problem_.window_left = setup_.mask.left;
  problem_.window_right = setup_.mask.right;
  problem_.alignment = setup_.mask.top_left ? FLASHTILE_TOP_LEFT : FLASHTILE_BOTTOM_RIGHT;
  problem_.seqused_q = reinterpret_cast<const int32_t*>(used_q_.data());
  problem_.seqused_k = reinterpret_cast<const int32_t*>(used_k_.data());
  problem_.flags = setup_.spec.deterministic ? FLASHTILE_DETERMINISTIC : 0;
  problem_.scores = scores_.scores();
  set_numbers(setup_.dtype, setup_.softmax_scale, problem_);
  if (setup_.spec.dtype_kv) problem_.dtype_kv = static_cast<int32_t>(*setup_.spec.dtype_kv);
  if (setup_.spec.is_varlen()) {
    problem_.cu_seqlens_q = reinterpret_cast<const int32_t*>(cu_q_.data());
    problem_.cu_seqlens_k = reinterpret_cast<const int32_t*>(cu_k_.data());
    problem_.total_q = setup_.extents_q.seq;
    problem_.total_k = setup_.extents_k.seq;
    // The longest length is a hint: here a useful one, a useless one with odd and random strides.
    const bool useful = setup_.spec.layout != Layout::kOdd && setup_.spec.layout != Layout::kRandom;
    problem_.seqlen_q =
        useful ? *std::max_element(setup_.spec.lengths_q.begin(), setup_.spec.lengths_q.end()) : 0;
    problem_.seqlen_k =
        useful ? *std::max_element(setup_.spec.lengths_k.begin(), setup_.spec.lengths_k.end()) : 1;
  } else {
    problem_.seqlen_q = setup_.extents_q.seq;
    problem_.seqlen_k = setup_.extents_k.seq;
  }
  if (setup_.spec.keys_in_cache) {
    problem_.page_size = setup_.extents_k.seq;
    problem_.num_pages = setup_.batch;
    problem_.cache_leftpad = reinterpret_cast<const int32_t*>(leftpad_.data());
  }
  if (setup_.spec.page_rows > 0) {
    problem_.page_size = setup_.spec.page_rows;
    problem_.num_pages = static_cast<int64_t>(setup_.block_table.size());
    problem_.block_table = reinterpret_cast<const int32_t*>(block_table_.data());
    problem_.max_blocks = problem_.block_table_stride = problem_.num_pages / setup_.batch;
  }
}

void Run::fill_params() {
  flashtile_forward_init(&forward_);
  forward_.problem = &problem_;
  forward_.q = q_.view();
  forward_.k = k_.view();
  forward_.v = v_.view();
  forward_.out = out_.view();
  forward_.softmax_lse = reinterpret_cast<float*>(lse_.data());
  forward_.lse_stride_batch = lse_.host.strides().batch;
  forward_.lse_stride_head = lse_.host.strides().head;
  if (setup_.spec.page_rows > 0) {
    forward_.k.stride_batch = setup_.spec.page_rows * forward_.k.stride_seq;
    forward_.v.stride_batch = setup_.spec.page_rows * forward_.v.stride_seq;
  }
  scores_.fill(forward_);
  flashtile_backward_init(&backward_);
  scores_.fill(backward_);
  backward_.problem = &problem_;
  backward_.q = q_.view();
  backward_.k = k_.view();
  backward_.v = v_.view();
  backward_.out = out_.view();
  backward_.dout = dout_.view();
  backward_.dq = dq_.view();
  backward_.dk = dk_.view();
  backward_.dv = dv_.view();
  backward_.softmax_lse = forward_.softmax_lse;
  backward_.lse_stride_batch = forward_.lse_stride_batch;
  backward_.lse_stride_head = forward_.lse_stride_head;
  if (setup_.spec.dlse) backward_.dsoftmax_lse = reinterpret_cast<const float*>(dlse_.data());
  backward_.dlse_stride_batch = dlse_.host.strides().batch;
  backward_.dlse_stride_head = dlse_.host.strides().head;
}

}  // namespace flashtile::test
