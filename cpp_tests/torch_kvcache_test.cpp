// flashtile/torch.h over a key/value cache, against manual attention written with torch operators.
#include <flashtile/torch.h>
#include <torch/torch.h>

#include "support/check.h"

namespace {

// One sequence in fp64: q (rows, heads, dim), k and v (keys, heads_kv, dim), causal at the bottom
// right.
at::Tensor manual(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const int64_t group = q.size(1) / k.size(1);
  const auto heads_first = [](const at::Tensor& t, int64_t repeat) {
    return t.to(at::kDouble).transpose(0, 1).repeat_interleave(repeat, 0);
  };
  at::Tensor scores = heads_first(q, 1).matmul(heads_first(k, group).transpose(1, 2)) /
                      std::sqrt(static_cast<double>(q.size(2)));
  const at::Tensor hidden =
      at::ones({q.size(0), k.size(0)}, at::kBool).triu(k.size(0) - q.size(0) + 1);
  scores.masked_fill_(hidden, -INFINITY);
  return at::softmax(scores, -1).matmul(heads_first(v, group)).transpose(0, 1);
}

at::Tensor ints(const std::vector<int32_t>& values) { return at::tensor(values, at::kInt); }

// x (rows, heads, dim) at positions `first` and on; pairs in halves.
at::Tensor rotated(const at::Tensor& x, int64_t first, const at::Tensor& cos,
                   const at::Tensor& sin) {
  const int64_t half = cos.size(1);
  const auto at_rows = [&](const at::Tensor& table) {
    return table.slice(0, first, first + x.size(0)).unsqueeze(1);
  };
  const at::Tensor a = x.slice(2, 0, half), b = x.slice(2, half, 2 * half);
  return at::cat({a * at_rows(cos) - b * at_rows(sin), a * at_rows(sin) + b * at_rows(cos),
                  x.slice(2, 2 * half)},
                 2);
}

// Pages of 8 rows; two sequences of 5 and 12 rows.
struct Pages {
  at::Tensor k = at::randn({6, 8, 2, 32}), v = at::randn({6, 8, 2, 48});
  at::Tensor table = ints({4, 0, 5, 1, 3, 2}).view({2, 3}), lengths = ints({5, 12});
  at::Tensor rows(const at::Tensor& cache, int64_t sequence, int64_t count) const {
    return cache.index_select(0, table[sequence].to(at::kLong)).flatten(0, 1).slice(0, 0, count);
  }
};

}  // namespace

TEST("flashtile/torch.h reads pages") {
  const at::NoGradGuard guard;
  const Pages pages;
  const at::Tensor q = at::randn({2, 3, 4, 32});
  const auto [out, lse] = flashtile::attention_with_kvcache(
      q, {.k = pages.k, .v = pages.v, .block_table = pages.table, .cache_seqlens = pages.lengths},
      {.causal = true, .return_lse = true});
  for (int64_t b = 0; b < 2; ++b) {
    const int64_t keys = b == 0 ? 5 : 12;
    const at::Tensor expected =
        manual(q[b], pages.rows(pages.k, b, keys), pages.rows(pages.v, b, keys));
    CHECK((out[b] - expected).abs().max().item<double>() < 1e-5);
  }
  CHECK(lse.sizes() == at::IntArrayRef({2, 4, 3}));
}

TEST("flashtile/torch.h appends, rotates and serves packed queries") {
  const at::NoGradGuard guard;
  const Pages pages;
  const at::Tensor q = at::randn({4, 4, 32}), k = at::randn({4, 2, 32}), v = at::randn({4, 2, 48});
  const at::Tensor angles = at::randn({40, 8}), cos = angles.cos(), sin = angles.sin();
  const at::Tensor out =
      flashtile::attention_with_kvcache(
          q,
          {.k = pages.k, .v = pages.v, .block_table = pages.table, .cache_seqlens = pages.lengths},
          {.append = flashtile::NewKeys{.k = k,
                                        .v = v,
                                        .rotary_cos = cos,
                                        .rotary_sin = sin,
                                        .rotary_interleaved = false},
           .cu_seqlens_q = ints({0, 1, 4}),
           .max_seqlen_q = 3,
           .causal = true})
          .out;
  for (int64_t b = 0; b < 2; ++b) {
    const int64_t begin = b == 0 ? 0 : 1, end = b == 0 ? 1 : 4, before = b == 0 ? 5 : 12;
    const int64_t keys = before + end - begin;
    const at::Tensor appended = pages.rows(pages.k, b, keys).slice(0, before);
    const at::Tensor turned = rotated(k.slice(0, begin, end), before, cos, sin);
    CHECK((appended - turned).abs().max().item<double>() < 1e-5);
    const at::Tensor expected = manual(rotated(q.slice(0, begin, end), before, cos, sin),
                                       pages.rows(pages.k, b, keys), pages.rows(pages.v, b, keys));
    CHECK((out.slice(0, begin, end) - expected).abs().max().item<double>() < 1e-5);
  }
}

TEST("flashtile/torch.h names a wrong number of the cache where it checks") {
  const at::NoGradGuard guard;
  Pages pages;
  const at::Tensor q = at::randn({2, 1, 4, 32});
  const flashtile::NewKeys added = {.k = at::randn({2, 1, 2, 32}), .v = at::randn({2, 1, 2, 48})};
  const auto said = [&](bool check) {
    try {
      flashtile::attention_with_kvcache(
          q,
          {.k = pages.k, .v = pages.v, .block_table = pages.table, .cache_seqlens = pages.lengths},
          {.append = added, .check = check});
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK_EQ(said(true), std::string());
  pages.lengths = ints({5, 24});
  for (const bool check : {false, true}) {
    CHECK_EQ(said(check),
             std::string("cache_seqlens[1] is 24 and 1 new rows follow; allowed: 24 in all, the "
                         "capacity"));
  }
  flashtile::raise_pending_checks();
}

TEST("flashtile/torch.h over a cache: out, the top-left corner, autocast, and no gradient") {
  const Pages pages;
  const at::Tensor q = at::randn({2, 3, 4, 32});
  const flashtile::KVCache cache = {
      .k = pages.k, .v = pages.v, .block_table = pages.table, .cache_seqlens = pages.lengths};
  const flashtile::KVCacheOptions top_left = {
      .causal = true, .causal_alignment = flashtile::CausalAlignment::kTopLeft};
  const at::Tensor first = flashtile::attention_with_kvcache(q, cache, top_left).out;
  for (int64_t b = 0; b < 2; ++b) {  // three queries see the first three keys
    const at::Tensor expected = manual(q[b], pages.rows(pages.k, b, 3), pages.rows(pages.v, b, 3));
    CHECK((first[b] - expected).abs().max().item<double>() < 1e-5);
  }
  at::Tensor buffer = at::full({2, 3, 4, 2, 48}, NAN);
  flashtile::KVCacheOptions into = top_left;
  into.out = buffer.select(3, 1);
  CHECK(flashtile::attention_with_kvcache(q, cache, into).out.is_same(*into.out));
  CHECK(at::equal(*into.out, first) && buffer.select(3, 0).isnan().all().item<bool>());

  at::autocast::set_autocast_enabled(at::kCPU, true);
  const at::Tensor cast =
      flashtile::attention_with_kvcache(q.to(at::kBFloat16), cache, top_left).out;
  at::autocast::set_autocast_enabled(at::kCPU, false);
  CHECK(cast.scalar_type() == at::kFloat);
  const at::Tensor rounded = q.to(at::kBFloat16).to(at::kFloat);
  CHECK(at::equal(cast, flashtile::attention_with_kvcache(rounded, cache, top_left).out));

  const at::Tensor wanting = q.clone().requires_grad_();
  const at::Tensor out = flashtile::attention_with_kvcache(wanting, cache, top_left).out;
  CHECK(out.requires_grad() && at::equal(out, first));
  std::string said;
  try {
    out.sum().backward();
  } catch (const std::exception& error) {
    said = error.what();
  }
  CHECK_EQ(said, std::string("attention_with_kvcache was differentiated; allowed: its result "
                             "without a gradient (attention and attention_varlen have one)"));
}

TEST("flashtile/torch.h refuses a cache call that makes no sense") {
  const Pages pages;
  const auto said = [&](const flashtile::KVCache& cache, const flashtile::KVCacheOptions& options) {
    try {
      flashtile::attention_with_kvcache(at::randn({2, 1, 4, 32}), cache, options);
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const flashtile::NewKeys added = {.k = at::randn({2, 1, 2, 32}), .v = at::randn({2, 1, 2, 48})};
  const auto is = [](const std::string& text, const char* sentence) {
    CHECK_EQ(text, std::string(sentence));
  };
  is(said({.k = pages.k, .v = pages.v}, {.append = added}),
     "cache_seqlens is unset; allowed: a tensor, which says where append.k belongs");
  is(said({.k = pages.k.clone().requires_grad_(), .v = pages.v, .cache_seqlens = pages.lengths},
          {.append = added}),
     "append is set and cache.k requires grad; allowed: none, or at::NoGradGuard, as what is "
     "written into the cache has no gradient");
  is(said({.k = pages.k, .v = pages.v, .cache_seqlens = ints({1})}, {}),
     "cache_seqlens has shape (1,); allowed: (2,)");
  is(said({.k = pages.k, .v = pages.v}, {.num_splits = -1}),
     "num_splits is -1; allowed: 0 to 2147483647");
  is(said({.k = pages.k, .v = pages.v}, {.out = pages.v.slice(0, 0, 2).slice(1, 0, 1)}),
     "out has shape (2, 1, 2, 48); allowed: (2, 1, 4, 48)");
}

TEST("flashtile/torch.h knows members of the cache by their earlier names") {
  const at::NoGradGuard guard;
  const at::Tensor k = at::randn({3, 8, 2, 32}), v = at::randn({3, 8, 2, 48});
  const at::Tensor lengths = ints({5, 7}), entries = ints({2, 0}), padding = ints({1, 0});
  const at::Tensor q = at::randn({2, 1, 4, 32});
  const flashtile::KVCache earlier = {
      .k = k, .v = v, .seqlens = lengths, .batch_idx = entries, .leftpad = padding};
  const flashtile::KVCache cache = {.k = k,
                                    .v = v,
                                    .cache_seqlens = lengths,
                                    .cache_batch_idx = entries,
                                    .cache_leftpad = padding};
  const at::Tensor out = flashtile::attention_with_kvcache(q, cache).out;
  CHECK(at::equal(flashtile::attention_with_kvcache(q, earlier).out, out));
  const at::Tensor expected = manual(q[0], k[2].slice(0, 1, 5), v[2].slice(0, 1, 5));
  CHECK((out[0] - expected).abs().max().item<double>() < 1e-5);

  flashtile::KVCache both = cache;
  both.leftpad = padding;
  const auto answer = flashtile::can_run_with_kvcache(q, both);
  CHECK(!answer.ok);
  CHECK_EQ(answer.why,
           std::string("cache_leftpad and leftpad are set; allowed: cache_leftpad, its name"));
}

TEST("flashtile/torch.h answers for a call over a cache, and writes nothing") {
  const at::NoGradGuard guard;
  const Pages pages;
  const at::Tensor q = at::randn({2, 1, 4, 32}), before = pages.k.clone();
  flashtile::KVCache cache = {
      .k = pages.k, .v = pages.v, .block_table = pages.table, .cache_seqlens = pages.lengths};
  const at::Tensor angles = at::randn({40, 8});
  flashtile::KVCacheOptions options = {.append = flashtile::NewKeys{.k = at::randn({2, 1, 2, 32}),
                                                                    .v = at::randn({2, 1, 2, 48}),
                                                                    .rotary_cos = angles.cos(),
                                                                    .rotary_sin = angles.sin()},
                                       .causal = true};
  const auto is = [&](bool ok, const char* sentence) {
    const auto answer = flashtile::can_run_with_kvcache(q, cache, options);
    CHECK_EQ(answer.ok, ok);
    CHECK_EQ(answer.why, std::string(sentence));
  };
  is(true, "");
  CHECK(at::equal(pages.k, before));
  cache.cache_seqlens = ints({5, 24});
  is(false, "cache_seqlens[1] is 24 and 1 new rows follow; allowed: 24 in all, the capacity");
  options.append.reset();
  is(true, "");
  options.num_splits = -1;
  is(false, "num_splits is -1; allowed: 0 to 2147483647");
  cache.cache_seqlens = std::nullopt;
  options = {.append = flashtile::NewKeys{.k = q, .v = q}};
  is(false, "cache_seqlens is unset; allowed: a tensor, which says where append.k belongs");
}
