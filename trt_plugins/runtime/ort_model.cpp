#include "ort_model.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "ort_handle.h"

namespace tinylm {
namespace {

constexpr const char* kTask = "text-generation-with-past";

using Shape = std::vector<std::int64_t>;

template <typename T>
constexpr ONNXTensorElementDataType kElementType = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
template <>
constexpr ONNXTensorElementDataType kElementType<float> = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
template <>
constexpr ONNXTensorElementDataType kElementType<std::int8_t> = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
template <>
constexpr ONNXTensorElementDataType kElementType<std::int32_t> =
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
template <>
constexpr ONNXTensorElementDataType kElementType<std::int64_t> =
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

/// A tensor that owns its memory, and the way into it.
template <typename T>
struct Tensor {
  ValueHandle value;
  T* data = nullptr;
};

template <typename T>
Tensor<T> make_tensor(const Shape& shape, T fill) {
  const OrtApi& api = ort_api();
  OrtAllocator* allocator = nullptr;  // ONNX Runtime's own, never released
  check(api.GetAllocatorWithDefaultOptions(&allocator));
  Tensor<T> tensor;
  tensor.value = make_handle<ValueHandle>([&](OrtValue** out) {
    return api.CreateTensorAsOrtValue(allocator, shape.data(), shape.size(), kElementType<T>, out);
  });
  void* data = nullptr;
  check(api.GetTensorMutableData(tensor.value.get(), &data));
  tensor.data = static_cast<T*>(data);
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  std::fill_n(tensor.data, count, fill);
  return tensor;
}

/// One run's tensors, bound to the graph's inputs and outputs.
struct Cache {
  BindingHandle binding;
  std::int64_t batch_size = 0;
  std::int64_t capacity = 0;
  std::int64_t length = 0;  ///< S of input_ids as bound.
  std::vector<ValueHandle> layers;
  Tensor<std::int64_t> input_ids;  // [B, S]
  Tensor<std::int32_t> past_lens;  // [B]
  Tensor<std::int32_t> seq_lens;   // [B]
  Tensor<float> logits;            // [B, V] or [B, S, V]

  void bind_input(const std::string& name, const ValueHandle& value) const {
    check(ort_api().BindInput(binding.get(), name.c_str(), value.get()));
  }

  void bind_output(const std::string& name, const ValueHandle& value) const {
    check(ort_api().BindOutput(binding.get(), name.c_str(), value.get()));
  }

  /// Makes one tensor of a layer's cache, past and present in one.
  template <typename T>
  void add_layer_part(std::int64_t layer, const char* part, const Shape& shape, T fill) {
    const std::string name = "." + std::to_string(layer) + "." + part;
    layers.push_back(make_tensor<T>(shape, fill).value);
    bind_input("past" + name, layers.back());
    bind_output("present" + name, layers.back());
  }
};

void require_file(const std::filesystem::path& path, const std::string& way_out) {
  if (!std::filesystem::is_regular_file(path)) {
    throw std::runtime_error(path.string() + ": not found. " + way_out);
  }
}

SessionOptionsHandle make_session_options(const OrtOptions& options) {
  const OrtApi& api = ort_api();
  auto handle = make_handle<SessionOptionsHandle>(
      [&](OrtSessionOptions** out) { return api.CreateSessionOptions(out); });
  check(api.SetIntraOpNumThreads(handle.get(), options.num_threads));
  // Up to 1.23 it fuses float64 products into an op that knows only float32.
  check(api.AddSessionConfigEntry(handle.get(), "optimization.disable_specified_optimizers",
                                  "MatmulTransposeFusion"));
  if (options.ops_library.empty()) return handle;
  const std::string way_out =
      "Give the path of libtinylm_ort.so, or none to run the model's function bodies.";
  require_file(options.ops_library, way_out);
  const auto path = std::filesystem::absolute(options.ops_library);
  try {
    check(api.RegisterCustomOpsLibrary_V2(handle.get(), path.c_str()));
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path.string() + ": the ops library can't be loaded (" + error.what() +
                             "). " + way_out);
  }
  return handle;
}

}  // namespace

struct OrtModel::Impl {
  Impl(const std::filesystem::path& directory, const OrtOptions& options);

  void start(std::int64_t batch_size, std::int64_t capacity);
  void set_length(std::int64_t length);
  void bind_logits();
  Logits step(const std::vector<std::int64_t>& ids, std::int64_t length,
              const std::vector<std::int32_t>& seq_lens);

  ExportInfo info;
  ModelConfig config;
  EnvHandle env;  // outlives the session
  SessionHandle session;
  Cache cache;
};

OrtModel::Impl::Impl(const std::filesystem::path& directory, const OrtOptions& options) {
  if (options.num_threads < 0) {
    throw std::invalid_argument("num_threads must be 0 (ONNX Runtime's choice) or more, found " +
                                std::to_string(options.num_threads) + ".");
  }
  info = ExportInfo::load(directory / "export.json");
  if (info.task != kTask) {
    throw std::runtime_error(directory.string() + ": task " + kTask + " expected, found " +
                             info.task + ", which has no cache. Export with --task " + kTask + ".");
  }
  config = ModelConfig::load(directory / "config.json");
  const auto path = directory / "model.onnx";
  require_file(path, "Export the checkpoint again with `tinylm-export onnx CKPT --out DIR`.");
  const OrtApi& api = ort_api();
  env = make_handle<EnvHandle>(
      [&](OrtEnv** out) { return api.CreateEnv(ORT_LOGGING_LEVEL_ERROR, "tinylm", out); });
  const SessionOptionsHandle session_options = make_session_options(options);
  try {
    session = make_handle<SessionHandle>([&](OrtSession** out) {
      return api.CreateSession(env.get(), path.c_str(), session_options.get(), out);
    });
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path.string() + ": ONNX Runtime " + ort_version() +
                             " can't load it (" + error.what() +
                             "). Use ONNX Runtime 1.23 or newer, or export the checkpoint again.");
  }
}

void OrtModel::Impl::start(std::int64_t batch_size, std::int64_t capacity) {
  check_start(batch_size, capacity, config.max_seq_len);
  const OrtApi& api = ort_api();
  Cache fresh;
  fresh.binding = make_handle<BindingHandle>(
      [&](OrtIoBinding** out) { return api.CreateIoBinding(session.get(), out); });
  fresh.batch_size = batch_size;
  fresh.capacity = capacity;
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    fresh.add_layer_part<std::int8_t>(layer, "latent", {batch_size, capacity, config.latent_rank},
                                      0);
    // Ones, not zeros: an empty slot then divides to 0 rather than to NaN.
    fresh.add_layer_part<float>(layer, "scale", {batch_size, capacity}, 1.0f);
    fresh.add_layer_part<float>(layer, "rope", {batch_size, capacity, config.rope_dim}, 0.0f);
  }
  fresh.past_lens = make_tensor<std::int32_t>({batch_size}, 0);
  fresh.seq_lens = make_tensor<std::int32_t>({batch_size}, 0);
  fresh.bind_input("past_lens", fresh.past_lens.value);
  fresh.bind_input("seq_lens", fresh.seq_lens.value);
  cache = std::move(fresh);
  if (!info.all_logits) bind_logits();
}

void OrtModel::Impl::bind_logits() {
  Shape shape{cache.batch_size, config.vocab_size};
  if (info.all_logits) shape.insert(shape.begin() + 1, cache.length);
  cache.logits = make_tensor<float>(shape, 0.0f);
  cache.bind_output("logits", cache.logits.value);
}

/// Binds what depends on S; decoding, where S stays 1, comes here once.
void OrtModel::Impl::set_length(std::int64_t length) {
  if (length == cache.length) return;
  cache.length = 0;  // in case of an exception
  cache.input_ids = make_tensor<std::int64_t>({cache.batch_size, length}, 0);
  cache.bind_input("input_ids", cache.input_ids.value);
  cache.length = length;
  if (info.all_logits) bind_logits();
}

Logits OrtModel::Impl::step(const std::vector<std::int64_t>& ids, std::int64_t length,
                            const std::vector<std::int32_t>& seq_lens) {
  const std::int32_t* past = cache.past_lens.data;
  check_step(config.vocab_size, {past, past + cache.batch_size}, cache.capacity, ids, length,
             seq_lens);
  set_length(length);
  std::copy(ids.begin(), ids.end(), cache.input_ids.data);
  std::copy(seq_lens.begin(), seq_lens.end(), cache.seq_lens.data);
  check(ort_api().RunWithBinding(session.get(), nullptr, cache.binding.get()));
  for (std::size_t row = 0; row < seq_lens.size(); ++row) {
    cache.past_lens.data[row] += seq_lens[row];
  }
  return {cache.logits.data, cache.batch_size, info.all_logits ? length : 1, config.vocab_size};
}

OrtModel::OrtModel(const std::filesystem::path& directory, const OrtOptions& options)
    : impl_(std::make_unique<Impl>(directory, options)) {}
OrtModel::~OrtModel() = default;
OrtModel::OrtModel(OrtModel&&) noexcept = default;
OrtModel& OrtModel::operator=(OrtModel&&) noexcept = default;

const ModelConfig& OrtModel::config() const { return impl_->config; }

void OrtModel::start(std::int64_t batch_size, std::int64_t capacity) {
  impl_->start(batch_size, capacity);
}

Logits OrtModel::step(const std::vector<std::int64_t>& ids, std::int64_t length,
                      const std::vector<std::int32_t>& seq_lens) {
  return impl_->step(ids, length, seq_lens);
}

}  // namespace tinylm
