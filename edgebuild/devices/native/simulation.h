// The guest's half of the simulator: see marks.h for the other end.
//
// The process itself runs on one thread. Where XNNPACK asks how many threads there are, it is told the simulated number,
// and cuts its work accordingly; each parallel loop is then run here, core after core in turn, as pthreadpool would
// spread it. With `sampled`, the middle of long loops is left out - it would repeat what was seen - and the outputs are
// then not those of the model.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include <executorch/runtime/core/event_tracer.h>

namespace simulation {

// From here on, parallel loops run as on so many threads.
void start(unsigned threads, bool sampled);

// The simulator takes no notice of anything before this, such as loading the model.
void follow();

// An inference begins, with empty caches where it is `cold`, and ends; what it took is written down where it `counts`. In
// between, operators are marked and their names kept.
void begin(bool cold);
void end(bool counts);

// Tells the operators of an inference apart; given to the Module that is simulated.
std::unique_ptr<executorch::runtime::EventTracer> tracer();

// Names of the operators of the latest inference, in the order in which they ended.
const std::vector<std::string> &operators();

}  // namespace simulation
