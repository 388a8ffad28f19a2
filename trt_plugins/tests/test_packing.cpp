/// @file test_packing.cpp
/// The golden bytes that Python tests too, and what packing refuses.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "generator.h"
#include "isa_fixture.h"
#include "linear_helpers.h"

namespace tinylm::testing {
namespace {

using cpu::LinearWeights;

/// The message of the std::invalid_argument that body throws, or "".
template <typename Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

struct Golden {
  std::string name;
  std::int64_t n, k;
  std::vector<std::int8_t> codes;
  std::vector<std::uint8_t> bytes;
};

std::vector<Golden> read_golden() {
  std::ifstream file(TINYLM_GOLDEN_PACKING);
  if (!file) throw std::runtime_error("can't open " TINYLM_GOLDEN_PACKING);
  const auto root = nlohmann::json::parse(file);
  std::vector<Golden> cases;
  for (const auto& item : root.at("cases")) {
    const auto codes = item.at("codes").get<std::vector<std::vector<int>>>();
    Golden golden{item.at("name"),
                  static_cast<std::int64_t>(codes.size()),
                  static_cast<std::int64_t>(codes[0].size()),
                  {},
                  {}};
    for (const auto& row : codes) golden.codes.insert(golden.codes.end(), row.begin(), row.end());
    for (const auto& row : item.at("bytes").get<std::vector<std::vector<std::string>>>()) {
      for (const auto& hex : row) {
        golden.bytes.push_back(static_cast<std::uint8_t>(std::stoi(hex, nullptr, 16)));
      }
    }
    cases.push_back(golden);
  }
  return cases;
}

class Packing : public IsaTest {};
TINYLM_FOR_EVERY_ISA(Packing);

TEST(PackingReference, FollowsTheGoldenBytes) {
  const auto cases = read_golden();
  ASSERT_GE(cases.size(), 9U);
  for (const Golden& golden : cases) {
    EXPECT_EQ(reference::pack(golden.codes), golden.bytes) << golden.name;
    EXPECT_EQ(reference::unpack(golden.bytes), golden.codes) << golden.name;
  }
}

/// Rows of an identity matrix, so that the sums are the codes themselves.
TEST_P(Packing, KernelsReadTheGoldenBytes) {
  for (const Golden& golden : read_golden()) {
    const std::vector<float> scale(static_cast<std::size_t>(golden.n), 1.0F);
    const auto weights =
        LinearWeights::pack_ternary(golden.bytes.data(), scale.data(), golden.n, golden.k);
    std::vector<std::int8_t> q(static_cast<std::size_t>(golden.k * golden.k));
    for (std::int64_t i = 0; i < golden.k; ++i) q[static_cast<std::size_t>(i * golden.k + i)] = 1;
    const auto sums = run_accumulate(*weights, q, golden.k);
    for (std::int64_t i = 0; i < golden.k; ++i) {
      for (std::int64_t j = 0; j < golden.n; ++j) {
        EXPECT_EQ(sums[static_cast<std::size_t>(i * golden.n + j)],
                  golden.codes[static_cast<std::size_t>(j * golden.k + i)])
            << golden.name << ", row " << j << ", column " << i;
      }
    }
  }
}

TEST_P(Packing, FindsTheFirstInvalidCode) {
  Random random(21);
  for (int number = 0; number < num_cases(500); ++number) {
    const std::int64_t n = random.integer(1, 40);
    const std::int64_t k = 4 * random.integer(1, 70);
    auto packed = reference::pack(random.int8s(n * k, -1, 1));
    EXPECT_FALSE(cpu::find_invalid_code(packed.data(), n, k).found);
    const std::int64_t at = random.integer(0, n * k - 1);
    for (const std::int64_t i : {at, n * k - 1}) {  // another behind it must not be named
      auto& byte = packed[static_cast<std::size_t>(i / 4)];
      byte = static_cast<std::uint8_t>(byte | (3U << (2 * (i % 4))));
    }
    const cpu::InvalidCode invalid = cpu::find_invalid_code(packed.data(), n, k);
    ASSERT_TRUE(invalid.found);
    ASSERT_EQ(invalid.row, at / k);
    ASSERT_EQ(invalid.column, at % k);
    const std::vector<float> scale(static_cast<std::size_t>(n), 1.0F);
    const std::string message =
        message_of([&] { LinearWeights::pack_ternary(packed.data(), scale.data(), n, k); });
    ASSERT_NE(message.find("row " + std::to_string(at / k)), std::string::npos) << message;
    ASSERT_NE(message.find("column " + std::to_string(at % k)), std::string::npos) << message;
  }
}

TEST_P(Packing, RefusesSizesOutOfRange) {
  const std::vector<std::uint8_t> packed(64, 0x55);
  const std::vector<std::int8_t> weight(64, 1);
  const std::vector<float> scale(16, 1.0F);
  const auto refused = [&](std::int64_t n, std::int64_t k) {
    EXPECT_NE(message_of([&] { LinearWeights::pack_ternary(packed.data(), scale.data(), n, k); }),
              "")
        << "ternary, n " << n << ", k " << k;
    EXPECT_NE(message_of([&] { LinearWeights::pack_int8(weight.data(), scale.data(), n, k); }), "")
        << "int8, n " << n << ", k " << k;
  };
  for (const std::int64_t n : {0, -1}) refused(n, 4);
  for (const std::int64_t k : {0, -4}) refused(2, k);
  refused(1, cpu::kMaxInputs + 4);
  for (const std::int64_t k : {1, 2, 3, 5, 6, 7, 9}) {
    EXPECT_NE(message_of([&] { LinearWeights::pack_ternary(packed.data(), scale.data(), 2, k); }),
              "")
        << k;
  }
}

TEST_P(Packing, RefusesAnInt8WeightOfMinus128) {
  std::vector<std::int8_t> weight(3 * 8, -127);
  const std::vector<float> scale(3, 1.0F);
  EXPECT_NO_THROW(LinearWeights::pack_int8(weight.data(), scale.data(), 3, 8));
  weight[13] = -128;
  const std::string message =
      message_of([&] { LinearWeights::pack_int8(weight.data(), scale.data(), 3, 8); });
  EXPECT_NE(message.find("-128"), std::string::npos) << message;
}

TEST_P(Packing, CopiesWhatItIsGiven) {
  std::vector<std::int8_t> codes(4, 1);
  std::vector<float> scale = {2.0F};
  auto packed = reference::pack(codes);
  const auto weights = LinearWeights::pack_ternary(packed.data(), scale.data(), 1, 4);
  packed.assign(1, 0);
  scale[0] = 5.0F;
  reference::LinearCase c;
  c.m = 1;
  c.n = 1;
  c.k = 4;
  c.x = reference::FloatTensor(cpu::FloatType::kFloat, 4);
  for (std::int64_t j = 0; j < 4; ++j) c.x.set(j, 127.0F);
  EXPECT_EQ(run_linear(*weights, c).get(0), 4.0F * 127.0F * 2.0F);
}

}  // namespace
}  // namespace tinylm::testing
