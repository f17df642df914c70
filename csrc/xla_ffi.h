// What a handler reads of XLA's foreign function interface: the layouts of its C ABI, version 0.3, as openxla/xla
// (xla/ffi/api/c_api.h) gives them and promises to keep them.  Stated here rather than taken from jaxlib's
// headers, so that every build serves jitted JAX, whatever is there when it is built; tests/backends/test_ffi.py compares
// them with the headers of the jaxlib that is installed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace maskgit::xla {

constexpr int kMajor = 0, kMinor = 3;

enum class DataType : int { PRED = 1, S32 = 4, S64 = 5, U8 = 6, U32 = 8, F16 = 10, F32 = 11, F64 = 12, BF16 = 16 };
enum Kind : int { kBuffer = 1, kArray = 1, kScalar = 3, kString = 4 };  // of arguments and results; of attributes
constexpr int kMetadata = 1, kExecute = 3, kInvalidArgument = 3, kInternal = 13;

struct Extension {
  size_t struct_size;
  int type;
  Extension* next;
};

// How every structure below begins.
struct Head {
  size_t struct_size;
  Extension* extensions;
};

struct Buffer : Head {
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;

  size_t element_count() const {
    size_t count = 1;
    for (int64_t i = 0; i < rank; ++i) count *= static_cast<size_t>(dims[i]);
    return count;
  }
};

struct Buffers : Head {
  int64_t size;
  int* kinds;
  Buffer** each;
};

struct Text {
  const char* data;
  size_t size;
};

struct Array {
  DataType dtype;
  size_t size;
  const void* data;
};

struct Scalar {
  DataType dtype;
  const void* value;
};

struct Attributes : Head {
  int64_t size;
  int* kinds;
  Text** names;
  void** values;  // Text*, Array*, Scalar*
};

struct Version : Head {
  int major_version, minor_version;
};

struct Error;
struct NewError : Head {
  const char* message;
  int code;
};

struct Api : Head {
  Version version;
  const void* internal;
  Error* (*create_error)(NewError*);
};

struct CallFrame : Head {
  const Api* api;
  void* context;
  int stage;
  Buffers args, rets;
  Attributes attributes;
};

struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
};

struct MetadataExtension : Extension {
  Metadata* metadata;
};

}  // namespace maskgit::xla
