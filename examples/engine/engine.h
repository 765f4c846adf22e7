// The engine: requests go in, steps are planned, computed and sampled, lines come out. One thread.
#pragma once

#include <functional>
#include <string>

#include "model.h"
#include "protocol.h"
#include "scheduler.h"

namespace engine {

class Engine {
 public:
  // `emit` gets every line that goes out.
  Engine(Model& model, const Limits& limits, int32_t num_pages,
         std::function<void(const std::string&)> emit);

  // A line that came in. What is wrong with it is answered by a line.
  void receive(const std::string& line);
  // Computes one step; false when no request is left.
  bool step();

  Stats stats() const;

 private:
  void receive(Request request);
  void receive(const Cancel& cancel);
  void receive(AskStats) { emit_(stats_line(stats())); }

  Batch make_batch(const Step& step) const;
  void take_token(Sequence& sequence, int32_t token);

  Model& model_;
  Scheduler scheduler_;
  std::function<void(const std::string&)> emit_;
  Stats counted_;  // what the scheduler does not know
};

}  // namespace engine
