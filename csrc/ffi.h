// XLA FFI handlers by name; none where the extension was built without XLA's headers.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace maskgit {
std::vector<std::pair<std::string, void*>> ffi_handlers();
}  // namespace maskgit
