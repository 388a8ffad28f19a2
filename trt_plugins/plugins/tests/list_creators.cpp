// Prints what a plugin library offers TensorRT: list_creators LIBRARY. One line for each creator:
// name, version, namespace and attributes, with tabs between them. Needs no GPU.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <iostream>

namespace {

using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(std::int32_t&);

void print(nvinfer1::IPluginCreatorV3One& creator) {
  std::cout << creator.getPluginName() << '\t' << creator.getPluginVersion() << '\t'
            << creator.getPluginNamespace() << '\t';
  const nvinfer1::PluginFieldCollection* fields = creator.getFieldNames();
  for (std::int32_t i = 0; i < fields->nbFields; ++i) {
    std::cout << (i > 0 ? "," : "") << fields->fields[i].name;
  }
  std::cout << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: list_creators LIBRARY\n";
    return 2;
  }
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  void* symbol = library != nullptr ? dlsym(library, "getCreators") : nullptr;
  if (symbol == nullptr || dlsym(library, "setLoggerFinder") == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  std::int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = reinterpret_cast<GetCreators>(symbol)(count);
  for (std::int32_t i = 0; i < count; ++i) {
    const char* kind = creators[i]->getInterfaceInfo().kind;
    if (std::strcmp(kind, "PLUGIN CREATOR_V3ONE") != 0) {
      std::cerr << "creator " << i << ": expected a PLUGIN CREATOR_V3ONE, found " << kind << '\n';
      return 1;
    }
    print(*static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]));
  }
  return 0;
}
