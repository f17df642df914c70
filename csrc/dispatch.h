// Which instruction set runs the row body: a ranked list, chosen once, overridable by name.
#pragma once
#include <string>
#include <vector>

#include "params.h"

namespace maskgit {

// Names of the compiled implementations that this CPU can run, best first.
std::vector<std::string> supported_implementations();
// The one in use: MASKGIT_CPU_ISA where it is set, else the best.  Throws std::invalid_argument.
std::string active_implementation();
// Chooses by name ("" for the default); throws std::invalid_argument naming the legal ones.
void set_implementation(const std::string& name);

void decode_step(StepParams& p);    // rows, selection, remask
void sample_tokens(StepParams& p);  // rows only

}  // namespace maskgit
