#include "sha256.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>

namespace tinylm {
namespace {

constexpr std::array<std::uint32_t, 64> kRoundConstants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
constexpr std::size_t kBlock = 64;  // bytes
constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kDigits = 64;

std::uint32_t rotate(std::uint32_t x, int count) { return (x >> count) | (x << (32 - count)); }

class Sha256 {
 public:
  void add_block(const std::uint8_t* block) {
    std::array<std::uint32_t, 64> w{};
    for (std::size_t i = 0; i < 16; ++i) {
      w[i] = std::uint32_t{block[4 * i]} << 24 | std::uint32_t{block[4 * i + 1]} << 16 |
             std::uint32_t{block[4 * i + 2]} << 8 | std::uint32_t{block[4 * i + 3]};
    }
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
      const std::uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
      const std::uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRoundConstants[i] + w[i];
      const std::uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
      const std::uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g;
      g = f;
      f = e;
      e = d + t1;
      d = c;
      c = b;
      b = a;
      a = t1 + t2;
    }
    const std::array<std::uint32_t, 8> sums{a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < sums.size(); ++i) state_[i] += sums[i];
  }

  std::string hex() const {
    constexpr const char* kHex = "0123456789abcdef";
    std::string text;
    for (const std::uint32_t word : state_) {
      for (int shift = 28; shift >= 0; shift -= 4) text += kHex[word >> shift & 15];
    }
    return text;
  }

 private:
  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
};

std::map<std::string, std::string> read_sums(const std::filesystem::path& path,
                                             const std::string& way_out) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path.string() + ": not found or not readable. " + way_out);
  std::map<std::string, std::string> sums;
  for (std::string line; std::getline(file, line);) {
    if (line.size() < kDigits + 3 || line.compare(kDigits, 2, "  ") != 0) {
      throw std::runtime_error(path.string() + ": damaged line '" + line + "'. " + way_out);
    }
    sums[line.substr(kDigits + 2)] = line.substr(0, kDigits);
  }
  return sums;
}

}  // namespace

std::string sha256(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path.string() + ": not found or not readable.");
  Sha256 digest;
  std::vector<std::uint8_t> buffer(kBlock << 14);  // 1 MiB
  std::uint64_t total = 0;
  std::size_t rest = 0;  // bytes of the last, unfinished block
  while (file) {
    file.read(reinterpret_cast<char*>(buffer.data()), static_cast<std::streamsize>(buffer.size()));
    const auto count = static_cast<std::size_t>(file.gcount());
    total += count;
    for (std::size_t i = 0; i + kBlock <= count; i += kBlock) digest.add_block(&buffer[i]);
    rest = count % kBlock;  // less than a whole buffer only at the end of the file
    if (rest != 0) std::memmove(buffer.data(), &buffer[count - rest], rest);
    if (count < buffer.size()) break;
  }
  if (file.bad()) throw std::runtime_error(path.string() + ": can't be read.");
  // A one, zeros, and the length in bits fill one block or two.
  std::array<std::uint8_t, 2 * kBlock> end{};
  std::copy_n(buffer.begin(), rest, end.begin());
  end[rest] = 0x80;
  const std::size_t size = rest + 1 + kLengthBytes <= kBlock ? kBlock : 2 * kBlock;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    end[size - 1 - i] = static_cast<std::uint8_t>(total * 8 >> 8 * i);
  }
  for (std::size_t i = 0; i < size; i += kBlock) digest.add_block(&end[i]);
  return digest.hex();
}

void check_sums(const std::filesystem::path& directory, const std::vector<std::string>& names,
                const std::string& way_out) {
  const auto list = directory / "SHA256SUMS";
  const auto sums = read_sums(list, way_out);
  for (const std::string& name : names) {
    const auto entry = sums.find(name);
    if (entry == sums.end()) {
      throw std::runtime_error(list.string() + ": a line for " + name + " expected, found none. " +
                               way_out);
    }
    const std::string found = sha256(directory / name);
    if (found != entry->second) {
      throw std::runtime_error((directory / name).string() + ": truncated or altered: SHA-256 " +
                               entry->second + " expected, found " + found + ". Copy it again. " +
                               way_out);
    }
  }
}

}  // namespace tinylm
