/// @file ort_handle.h
/// ONNX Runtime's C API with owners for its objects and exceptions for its statuses. Private to the
/// library: no public header includes it.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <memory>
#include <string>

namespace tinylm {

/// Oldest C API version with every function that is called here; ONNX Runtime 1.17 brought it.
inline constexpr std::uint32_t kOrtApiVersion = 17;

/// Environment variable that names the ONNX Runtime library to load.
inline constexpr const char* kOrtLibraryVariable = "TINYLM_ONNXRUNTIME_LIBRARY";

/// Returns the C API, loading ONNX Runtime when first called: the library that
/// TINYLM_ONNXRUNTIME_LIBRARY names; else the one this library was configured with, where it still
/// lies; else the loader's libonnxruntime.so.1.
///
/// It is loaded rather than linked because its symbols carry the release's number: a program linked
/// with one release would start with no other.
/// @throws std::runtime_error It is not found, or too old.
const OrtApi& ort_api();

/// Returns ONNX Runtime's release, such as "1.23.2".
std::string ort_version();

/// Releases `status`.
/// @throws std::runtime_error It is an error; holds ONNX Runtime's message.
void check(OrtStatus* status);

/// Deleter that calls a member of OrtApi.
template <auto Release>
struct OrtRelease {
  template <typename T>
  void operator()(T* object) const {
    (ort_api().*Release)(object);
  }
};

using EnvHandle = std::unique_ptr<OrtEnv, OrtRelease<&OrtApi::ReleaseEnv>>;
using SessionOptionsHandle =
    std::unique_ptr<OrtSessionOptions, OrtRelease<&OrtApi::ReleaseSessionOptions>>;
using SessionHandle = std::unique_ptr<OrtSession, OrtRelease<&OrtApi::ReleaseSession>>;
using BindingHandle = std::unique_ptr<OrtIoBinding, OrtRelease<&OrtApi::ReleaseIoBinding>>;
using ValueHandle = std::unique_ptr<OrtValue, OrtRelease<&OrtApi::ReleaseValue>>;

/// Makes an object with a C function that returns it through a pointer.
/// @param create Called with a pointer to the object's pointer; returns a status.
/// @throws std::runtime_error The status is an error.
template <typename Handle, typename Create>
Handle make_handle(Create create) {
  typename Handle::pointer object = nullptr;
  check(create(&object));
  return Handle(object);
}

}  // namespace tinylm
