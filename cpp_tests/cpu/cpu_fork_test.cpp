// A child of fork() whose parent has computed with several threads: their OpenMP runtime does not
// survive the fork, and waiting for it would never end.
#if defined(__unix__)
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <string>

#include "../support/attempt.h"
#include "../support/cache_case.h"
#include "../support/check.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace flashtile::test;

namespace {

// Forward, backward, an append and attention over the cache.
struct Calls {
  AttentionOutput values;
  std::vector<double> attended;
  std::string error;

  Calls() {
    const Case spec = {.name = "fork", .heads = 4, .heads_kv = 2, .seqlen_q = 200, .seqlen_k = 230};
    const RunResult run = Run(make_setup(spec, Dtype::kFloat32, 32, kCausal, 5), cpu_backend())();
    CacheCall cache({.dtype = Dtype::kBFloat16,
                     .heads = 4,
                     .heads_kv = 2,
                     .dims = 32,
                     .sequences = {{.seed = 1, .keys = 700, .queries = 2, .added = 2}},
                     .page_size = 16,
                     .packed = true});
    error = run.error + cache.append();
    const CacheResult result = cache.run();
    error += result.error;
    values = run.values;
    attended = result.out;
  }
};

// The child's exit status, or minus the signal that ended it.
int status_of(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

}  // namespace

TEST("a child of fork() computes what its parent computes, and so does its own child") {
#if defined(_OPENMP)
  omp_set_num_threads(2);
#endif
  const Calls parent;
  CHECK_EQ(parent.error, std::string());
  const auto same = [&] {
    alarm(20);  // a call that hangs ends the process
    const Calls own;
    return own.error.empty() && identical(own.values, parent.values) &&
           own.attended == parent.attended;
  };
  const pid_t child = fork();
  if (child == 0) {
    if (!same()) _exit(1);
    const pid_t grandchild = fork();
    if (grandchild == 0) _exit(same() ? 0 : 3);
    _exit(status_of(grandchild) == 0 ? 0 : 2);
  }
  CHECK_EQ(status_of(child), 0);
  CHECK(same());  // the parent still computes with two
  alarm(0);
}
#endif
