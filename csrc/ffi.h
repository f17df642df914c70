// XLA FFI handlers by name.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace maskgit {
std::vector<std::pair<std::string, void*>> ffi_handlers();
}  // namespace maskgit
