#include "trt_model.h"

#include <algorithm>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "engine_manifest.h"
#include "sha256.h"
#include "trt_library.h"

namespace tinylm {
namespace {

constexpr int kDecodeProfile = 0;
constexpr int kPrefillProfile = 1;
constexpr int kNumProfiles = 2;
constexpr const char* kWayOut = "Build the engine again with `tinylm-export trt`.";
constexpr const char* kIds = "input_ids";         // INT64 [B, S]
constexpr const char* kPastLens = "past_lens";    // INT32 [B]
constexpr const char* kSeqLens = "seq_lens";      // INT32 [B]
constexpr const char* kLogits = "logits";         // FLOAT [B, V], or [B, S, V]
constexpr const char* kLatent = "past.0.latent";  // INT8 [B, C, R]

using nvinfer1::Dims;
using ContextHandle = std::unique_ptr<nvinfer1::IExecutionContext>;

std::size_t volume(const Dims& shape) {
  std::size_t count = 1;
  for (int i = 0; i < shape.nbDims; ++i) count *= static_cast<std::size_t>(shape.d[i]);
  return count;
}

std::size_t element_size(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kINT64:
      return 8;
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32:
      return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16:
      return 2;
    case nvinfer1::DataType::kINT8:
      return 1;
    default:
      throw std::runtime_error("a tensor of type " + std::to_string(static_cast<int>(type)) +
                               " is none of TinyLM's engines.");
  }
}

Dims make_dims(std::initializer_list<std::int64_t> sizes) {
  Dims dims{};
  for (const std::int64_t size : sizes) dims.d[dims.nbDims++] = size;
  return dims;
}

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

/// What one step reads and writes, on the host and on the device.
struct StepBuffers {
  std::int64_t length = 0;  ///< S; 0 before the first step.
  DeviceMemory device_ids;
  DeviceMemory device_logits;
  PinnedMemory<std::int64_t> ids;
  PinnedMemory<float> logits;
  std::size_t num_ids = 0;
  std::size_t num_logits = 0;
};

/// One tensor of the cache, past and present in one.
struct CachePart {
  std::string name;  ///< past.{i}.{part}
  Dims shape{};
  DeviceMemory memory;
  std::size_t num_bytes = 0;
};

/// The memory of one batch size and capacity, and the graph of its decode step.
struct Cache {
  std::int64_t batch_size = 0;
  std::int64_t capacity = 0;
  std::vector<std::int32_t> past_lens;  // [B]
  std::vector<CachePart> parts;
  DeviceMemory device_past_lens;
  DeviceMemory device_seq_lens;
  PinnedMemory<std::int32_t> host_past_lens;
  PinnedMemory<std::int32_t> host_seq_lens;
  StepBuffers steps[kNumProfiles];
  bool warm = false;  ///< Whether a decode step has run.
  GraphHandle graph;

  /// Makes it empty.
  void clear() {
    std::fill(past_lens.begin(), past_lens.end(), 0);
    for (const CachePart& part : parts) {
      if (!ends_with(part.name, ".scale")) {
        check(cudaMemset(part.memory.get(), 0, part.num_bytes), "clearing the cache");
        continue;
      }
      // Ones, not zeros: an empty slot then divides to 0 rather than to NaN.
      const std::vector<float> ones(part.num_bytes / sizeof(float), 1.0f);
      check(cudaMemcpy(part.memory.get(), ones.data(), part.num_bytes, cudaMemcpyHostToDevice),
            "clearing the cache");
    }
  }
};

}  // namespace

struct TrtModel::Impl {
  Impl(const std::filesystem::path& directory, const TrtOptions& options);
  /// Nothing may be in flight when the memory goes.
  ~Impl() {
    if (stream != nullptr) cudaStreamSynchronize(stream.get());
  }

  void load_engine(const EngineManifest& manifest, const TrtOptions& options);
  void check_tensors() const;
  std::int64_t largest(const char* name, int dimension) const;
  std::runtime_error failure(const std::string& what);
  void start(std::int64_t batch_size, std::int64_t capacity);
  void bind_cache(nvinfer1::IExecutionContext& context);
  void set_length(int profile, std::int64_t length);
  void enqueue(int profile);
  void run_decode();
  Logits step(const std::vector<std::int64_t>& ids, std::int64_t length,
              const std::vector<std::int32_t>& seq_lens);

  std::filesystem::path directory;
  ModelConfig config;
  bool cuda_graph;
  bool all_logits = false;
  std::int64_t max_batch_size = 0;
  std::int64_t max_length = 0;
  // Each needs those before it, so they go in the other order.
  TrtLogger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  StreamHandle stream;
  Cache cache;
  ContextHandle contexts[kNumProfiles];
};

TrtModel::Impl::Impl(const std::filesystem::path& path, const TrtOptions& options)
    : directory(path), cuda_graph(options.cuda_graph) {
  const auto manifest = EngineManifest::load(directory);
  if (options.verify) {
    check_sums(directory, {kEngineFile, kManifestFile, "config.json"}, kWayOut);
  }
  config = ModelConfig::load(directory / "config.json");
  if (manifest.dense) {
    throw std::runtime_error(directory.string() +
                             ": a --dense engine only serves `tinylm-export bench`. Build one "
                             "without --dense.");
  }
  manifest.check_tensorrt(trt_version());
  int device = 0;
  check(cudaGetDevice(&device), "no GPU is found; an engine needs an NVIDIA GPU and its driver");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "the GPU's properties");
  manifest.check_gpu(properties.name,
                     std::to_string(properties.major) + "." + std::to_string(properties.minor));
  load_engine(manifest, options);
  check_tensors();
  all_logits = engine->getTensorShape(kLogits).nbDims == 3;
  max_batch_size = largest(kIds, 0);
  max_length = largest(kIds, 1);
  // The context is what the engine takes, which may be less than the model does.
  config.max_seq_len = std::min(largest(kLatent, 1), config.max_seq_len);
  cudaStream_t made = nullptr;
  check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "a stream");
  stream.reset(made);
  for (int profile = 0; profile < kNumProfiles; ++profile) {
    // Memory for this profile only: the static strategy takes the largest profile's twice.
    contexts[profile].reset(engine->createExecutionContext(
        nvinfer1::ExecutionContextAllocationStrategy::kON_PROFILE_CHANGE));
    if (contexts[profile] == nullptr ||
        !contexts[profile]->setOptimizationProfileAsync(profile, stream.get())) {
      throw failure("TensorRT can't make a context for profile " + std::to_string(profile));
    }
  }
  check(cudaStreamSynchronize(stream.get()), "making contexts");
}

void TrtModel::Impl::load_engine(const EngineManifest& manifest, const TrtOptions& options) {
  runtime = make_trt_runtime(logger);
  if (manifest.embedded_plugins) {
    // Their code is in the engine. Its bytes are those that SHA256SUMS lists.
    runtime->setEngineHostCodeAllowed(true);
  } else if (options.plugins.empty()) {
    throw std::runtime_error(directory.string() +
                             ": the engine needs the plugin library beside it. Give the path of "
                             "libtinylm_trt.so (tinylm-run: --plugins), or build the engine with "
                             "its plugins in it.");
  } else {
    manifest.check_plugins(load_plugins(options.plugins, logger));
  }
  const auto path = directory / kEngineFile;
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path.string() + ": not found or not readable. " + kWayOut);
  std::vector<char> bytes(static_cast<std::size_t>(file.tellg()));
  file.seekg(0);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw std::runtime_error(path.string() + ": can't be read. " + kWayOut);
  }
  engine.reset(runtime->deserializeCudaEngine(bytes.data(), bytes.size()));
  if (engine == nullptr) throw failure("TensorRT " + trt_version() + " can't load the engine");
}

std::runtime_error TrtModel::Impl::failure(const std::string& what) {
  return std::runtime_error(directory.string() + ": " + what + ": " + logger.last() + " " +
                            kWayOut);
}

/// Checks that the engine is one of ours for the model of config.json.
void TrtModel::Impl::check_tensors() const {
  std::vector<std::string> names{kIds, kPastLens, kSeqLens, kLogits};
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    for (const char* part : {"latent", "scale", "rope"}) {
      for (const char* side : {"past.", "present."}) {
        names.push_back(side + std::to_string(layer) + "." + part);
      }
    }
  }
  std::vector<std::string> found;
  for (int i = 0; i < engine->getNbIOTensors(); ++i) found.push_back(engine->getIOTensorName(i));
  std::sort(names.begin(), names.end());
  std::sort(found.begin(), found.end());
  if (names == found && engine->getNbOptimizationProfiles() == kNumProfiles) return;
  throw std::runtime_error(
      directory.string() + ": an engine with " + std::to_string(names.size()) + " tensors and " +
      std::to_string(kNumProfiles) + " profiles expected for config.json's " +
      std::to_string(config.num_layers) + " layers, found " + std::to_string(found.size()) +
      " tensors and " + std::to_string(engine->getNbOptimizationProfiles()) + " profiles. " +
      kWayOut);
}

std::int64_t TrtModel::Impl::largest(const char* name, int dimension) const {
  return engine->getProfileShape(name, kPrefillProfile, nvinfer1::OptProfileSelector::kMAX)
      .d[dimension];
}

void TrtModel::Impl::start(std::int64_t batch_size, std::int64_t capacity) {
  check_start(batch_size, capacity, config.max_seq_len);
  if (batch_size > max_batch_size) {
    throw std::invalid_argument("batch_size must be from 1 to " + std::to_string(max_batch_size) +
                                ", as the engine was built, found " + std::to_string(batch_size) +
                                ". Build it with a larger --max-batch-size.");
  }
  if (cache.batch_size == batch_size && cache.capacity == capacity) {
    cache.clear();  // addresses and the graph stay
    return;
  }
  cache = Cache{};  // its memory is free before the next is taken
  Cache fresh;
  fresh.batch_size = batch_size;
  fresh.capacity = capacity;
  const auto rows = static_cast<std::size_t>(batch_size);
  fresh.past_lens.resize(rows);
  fresh.device_past_lens = device_memory(rows * sizeof(std::int32_t));
  fresh.device_seq_lens = device_memory(rows * sizeof(std::int32_t));
  fresh.host_past_lens = pinned_memory<std::int32_t>(rows);
  fresh.host_seq_lens = pinned_memory<std::int32_t>(rows);
  for (int i = 0; i < engine->getNbIOTensors(); ++i) {
    CachePart part;
    part.name = engine->getIOTensorName(i);
    if (!starts_with(part.name, "past.")) continue;
    part.shape = engine->getTensorShape(part.name.c_str());
    part.shape.d[0] = batch_size;
    part.shape.d[1] = capacity;
    part.num_bytes =
        volume(part.shape) * element_size(engine->getTensorDataType(part.name.c_str()));
    part.memory = device_memory(part.num_bytes);
    fresh.parts.push_back(std::move(part));
  }
  fresh.clear();
  cache = std::move(fresh);
  for (const ContextHandle& context : contexts) bind_cache(*context);
}

void TrtModel::Impl::bind_cache(nvinfer1::IExecutionContext& context) {
  bool bound = true;
  for (const CachePart& part : cache.parts) {
    const std::string present = "present" + part.name.substr(std::string("past").size());
    bound = context.setInputShape(part.name.c_str(), part.shape) &&
            context.setTensorAddress(part.name.c_str(), part.memory.get()) &&
            context.setTensorAddress(present.c_str(), part.memory.get()) && bound;
  }
  const Dims rows = make_dims({cache.batch_size});
  bound = context.setInputShape(kPastLens, rows) && context.setInputShape(kSeqLens, rows) &&
          context.setTensorAddress(kPastLens, cache.device_past_lens.get()) &&
          context.setTensorAddress(kSeqLens, cache.device_seq_lens.get()) && bound;
  if (!bound) {
    cache = Cache{};
    throw failure("TensorRT refuses a cache of the engine's own sizes");
  }
}

/// Binds what depends on S; decoding, where S stays 1, comes here once.
void TrtModel::Impl::set_length(int profile, std::int64_t length) {
  StepBuffers& buffers = cache.steps[profile];
  if (buffers.length == length) return;
  buffers = StepBuffers{};
  nvinfer1::IExecutionContext& context = *contexts[profile];
  if (!context.setInputShape(kIds, make_dims({cache.batch_size, length}))) {
    throw failure("TensorRT refuses a step of " + std::to_string(length) + " tokens");
  }
  buffers.num_ids = static_cast<std::size_t>(cache.batch_size * length);
  buffers.num_logits =
      static_cast<std::size_t>(cache.batch_size * (all_logits ? length : 1) * config.vocab_size);
  buffers.device_ids = device_memory(buffers.num_ids * sizeof(std::int64_t));
  buffers.device_logits = device_memory(buffers.num_logits * sizeof(float));
  buffers.ids = pinned_memory<std::int64_t>(buffers.num_ids);
  buffers.logits = pinned_memory<float>(buffers.num_logits);
  if (volume(context.getTensorShape(kLogits)) != buffers.num_logits ||
      !context.setTensorAddress(kIds, buffers.device_ids.get()) ||
      !context.setTensorAddress(kLogits, buffers.device_logits.get())) {
    throw failure("logits of another shape than config.json's");
  }
  buffers.length = length;
}

/// Puts a whole step on the stream: tokens in, the engine, logits out.
void TrtModel::Impl::enqueue(int profile) {
  const StepBuffers& buffers = cache.steps[profile];
  const std::size_t rows_bytes = cache.past_lens.size() * sizeof(std::int32_t);
  const auto to_device = [&](void* target, const void* source, std::size_t num_bytes) {
    check(cudaMemcpyAsync(target, source, num_bytes, cudaMemcpyHostToDevice, stream.get()),
          "copying a step's input");
  };
  to_device(buffers.device_ids.get(), buffers.ids.get(), buffers.num_ids * sizeof(std::int64_t));
  to_device(cache.device_past_lens.get(), cache.host_past_lens.get(), rows_bytes);
  to_device(cache.device_seq_lens.get(), cache.host_seq_lens.get(), rows_bytes);
  if (!contexts[profile]->enqueueV3(stream.get())) throw failure("TensorRT failed in a step");
  check(cudaMemcpyAsync(buffers.logits.get(), buffers.device_logits.get(),
                        buffers.num_logits * sizeof(float), cudaMemcpyDeviceToHost, stream.get()),
        "copying the logits");
}

/// Runs a step of one token a row; the second one is captured, later ones are replayed.
void TrtModel::Impl::run_decode() {
  if (!cuda_graph || !cache.warm) {
    enqueue(kDecodeProfile);
    cache.warm = true;
    return;
  }
  if (cache.graph == nullptr) {
    check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "capturing");
    cudaGraph_t captured = nullptr;
    try {
      enqueue(kDecodeProfile);
    } catch (...) {
      cudaStreamEndCapture(stream.get(), &captured);
      if (captured != nullptr) cudaGraphDestroy(captured);
      throw;
    }
    check(cudaStreamEndCapture(stream.get(), &captured), "capturing the decode step");
    cudaGraphExec_t made = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&made, captured, 0);
    cudaGraphDestroy(captured);
    check(status, "making a graph of the decode step");
    cache.graph.reset(made);
  }
  check(cudaGraphLaunch(cache.graph.get(), stream.get()), "launching the decode step");
}

Logits TrtModel::Impl::step(const std::vector<std::int64_t>& ids, std::int64_t length,
                            const std::vector<std::int32_t>& seq_lens) {
  check_step(config.vocab_size, cache.past_lens, cache.capacity, ids, length, seq_lens);
  if (length > max_length) {
    throw std::invalid_argument("a step takes at most " + std::to_string(max_length) +
                                " tokens a row, as the engine was built, found " +
                                std::to_string(length) + ". Give the prompt in several steps.");
  }
  const int profile = length == 1 ? kDecodeProfile : kPrefillProfile;
  set_length(profile, length);
  const StepBuffers& buffers = cache.steps[profile];
  std::copy(ids.begin(), ids.end(), buffers.ids.get());
  std::copy(seq_lens.begin(), seq_lens.end(), cache.host_seq_lens.get());
  std::copy(cache.past_lens.begin(), cache.past_lens.end(), cache.host_past_lens.get());
  if (profile == kDecodeProfile) {
    run_decode();
  } else {
    enqueue(profile);
  }
  check(cudaStreamSynchronize(stream.get()), "running a step");
  for (std::size_t row = 0; row < seq_lens.size(); ++row) cache.past_lens[row] += seq_lens[row];
  return {buffers.logits.get(), cache.batch_size, all_logits ? length : 1, config.vocab_size};
}

TrtModel::TrtModel(const std::filesystem::path& directory, const TrtOptions& options)
    : impl_(std::make_unique<Impl>(directory, options)) {}
TrtModel::~TrtModel() = default;
TrtModel::TrtModel(TrtModel&&) noexcept = default;
TrtModel& TrtModel::operator=(TrtModel&&) noexcept = default;

const ModelConfig& TrtModel::config() const { return impl_->config; }

void TrtModel::start(std::int64_t batch_size, std::int64_t capacity) {
  impl_->start(batch_size, capacity);
}

Logits TrtModel::step(const std::vector<std::int64_t>& ids, std::int64_t length,
                      const std::vector<std::int32_t>& seq_lens) {
  return impl_->step(ids, length, seq_lens);
}

}  // namespace tinylm
