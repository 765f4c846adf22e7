// A sequence's bits depend on the sequence alone: not on its neighbours, where its rows lie, how
// long its padding is, or how many threads compute. Bit for bit.
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <random>

#include "../support/cache_case.h"
#include "../support/check.h"

using namespace flashtile::test;

namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  uint64_t next() { return bits_(); }
  int below(int n) { return static_cast<int>(bits_() % static_cast<uint64_t>(n)); }
  template <class T>
  T one_of(const std::vector<T>& values) {
    return values[static_cast<size_t>(below(static_cast<int>(values.size())))];
  }

 private:
  std::mt19937_64 bits_;
};

void use_threads([[maybe_unused]] int count) {
#if defined(_OPENMP)
  omp_set_num_threads(count);
#endif
}

// `one` somewhere among up to four others, on pages or not, behind padding of its own.
CacheSpec neighbouring(CacheSpec spec, const CacheSequence& one, Random& random, size_t& place) {
  spec.page_size = random.one_of<int>({0, 1, 7, 16, 48, 128, 256});
  spec.packed = true;
  spec.batch_idx = spec.page_size == 0 && random.below(2) == 1;
  spec.layout_seed = random.next();
  spec.sequences = {one};
  for (int n = random.below(5); n > 0; --n) {
    // Now and then one that is cut into other parts.
    const int keys = random.below(24) == 0 ? 4200 + random.below(3000) : random.below(500);
    const int queries = random.below(4) == 0 ? random.below(60) : 1;
    spec.sequences.push_back({.seed = random.next(), .keys = keys, .queries = queries});
  }
  place = static_cast<size_t>(random.below(static_cast<int>(spec.sequences.size())));
  std::swap(spec.sequences[0], spec.sequences[place]);
  spec.sequences[place].leftpad = random.below(3) == 0 ? random.below(50) : 0;
  return spec;
}

// Heads in groups of 1 to 16 and one key head for all; head dims of every class; a sequence that
// decodes, one that decodes several tokens, and two prefills.
struct Subject {
  int heads, heads_kv;
  HeadDims dims;
  CacheSequence sequence;
  Mask mask = kCausal;
};
const std::vector<Subject> kSubjects = {
    {4, 2, 64, {.seed = 1, .keys = 333}},
    {2, 2, 128, {.seed = 2, .keys = 1}},
    {16, 1, 96, {.seed = 3, .keys = 700}},
    {32, 2, 32, {.seed = 4, .keys = 129, .queries = 1}},
    {6, 2, 33, {.seed = 5, .keys = 256, .queries = 3}, {100, 0}},
    {8, 2, {192, 128}, {.seed = 6, .keys = 90, .queries = 4}},
    {14, 2, 80, {.seed = 7, .keys = 400, .queries = 2}, {-1, -1}},
    {3, 1, 256, {.seed = 8, .keys = 65, .queries = 5}, {17, 9}},
    {4, 2, 64, {.seed = 9, .keys = 300, .queries = 40}},
    {5, 1, {40, 160}, {.seed = 10, .keys = 520, .queries = 17}, {40, 0}},
};

}  // namespace

TEST("batch invariance: the same bits in 200 random neighbourings, page sizes and paddings") {
  Random random(7);
  int neighbourings = 0;
  for (const Subject& subject : kSubjects) {
    for (const Dtype dtype :
         {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64}) {
      const CacheSpec alone = {.dtype = dtype,
                               .heads = subject.heads,
                               .heads_kv = subject.heads_kv,
                               .dims = subject.dims,
                               .sequences = {subject.sequence},
                               .mask = subject.mask};
      use_threads(1);
      CacheCall first(alone);
      const std::vector<double> bits = rows_of(first, first.run(), 0);
      for (int i = 0; i < 5; ++i, ++neighbourings) {
        size_t place = 0;
        const CacheSpec spec = neighbouring(alone, subject.sequence, random, place);
        use_threads(1 + random.below(4));
        CacheCall call(spec);
        const CacheResult result = call.run();
        CHECK_EQ(result.error, std::string());
        CHECK_MESSAGE(
            rows_of(call, result, place) == bits,
            spec.name() + ": other bits in neighbouring " + std::to_string(neighbourings));
      }
    }
  }
  CHECK_EQ(neighbourings, 200);
}

// More threads than there is room for, and fewer than tasks: what each computes stays the same.
TEST("batch invariance: the number of threads changes no bit of a call") {
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat32}) {
    CacheCall call({.dtype = dtype,
                    .heads = 8,
                    .heads_kv = 2,
                    .sequences = {{.seed = 1, .keys = 5000},
                                  {.seed = 2, .keys = 800, .queries = 130},
                                  {.seed = 3, .keys = 31, .queries = 2}},
                    .page_size = 48,
                    .packed = true});
    use_threads(1);
    const CacheResult one = call.run();
    for (const int threads : {2, 3, 8}) {
      use_threads(threads);
      const CacheResult many = call.run();
      CHECK_EQ(many.error, std::string());
      CHECK_MESSAGE(many.out == one.out && many.lse == one.lse,
                    std::to_string(threads) + " threads");
    }
  }
}
