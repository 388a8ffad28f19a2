// How products of few rows are spread over a GPU: plain arithmetic, so it needs none.
#include <gtest/gtest.h>

#include <tuple>

#include "../kernels/cuda/gemv_plan.h"

namespace tinylm::cuda {
namespace {

constexpr int kH200 = 132;  // multiprocessors

using Tiles = std::tuple<int, int, int>;  // of rows, of outputs, warps

Tiles tiles(std::int64_t m, std::int64_t n, std::int64_t k, bool digits = false) {
  const GemvPlan plan = plan_gemv(m, n, k, digits, kH200);
  return {plan.row_tiles, plan.output_tiles, plan.warps};
}

TEST(GemvPlan, IsTheFastestThatWasMeasured) {
  constexpr Tiles kLeast{1, 1, 8}, kManyInputs{1, 1, 16}, kOneRowTile{1, 2, 8}, kUsual{2, 2, 8};
  constexpr Tiles kMost{4, 2, 8};
  EXPECT_EQ(tiles(8, 1024, 1024), kLeast);
  EXPECT_EQ(tiles(32, 1024, 1024), kLeast);
  EXPECT_EQ(tiles(64, 1024, 1024), kUsual);
  EXPECT_EQ(tiles(256, 1024, 1024), kMost);
  EXPECT_EQ(tiles(8, 5632, 1024), kLeast);
  EXPECT_EQ(tiles(32, 5632, 1024), kUsual);
  EXPECT_EQ(tiles(16, 1024, 2816), kManyInputs);
  EXPECT_EQ(tiles(32, 1024, 2816), kLeast);
  EXPECT_EQ(tiles(64, 1024, 2816), kUsual);
  EXPECT_EQ(tiles(8, 4096, 4096), kLeast);
  EXPECT_EQ(tiles(32, 4096, 4096), kUsual);
  EXPECT_EQ(tiles(64, 4096, 4096), kMost);
  EXPECT_EQ(tiles(8, 8192, 8192), kOneRowTile);
  EXPECT_EQ(tiles(32, 8192, 8192), kMost);
  EXPECT_EQ(tiles(32, 8192, 8192, true), kUsual);  // digits: too few registers
}

TEST(GemvPlan, CoversEveryRowAndOutput) {
  for (const std::int64_t m : {1, 8, 9, 16, 17, 33, 256}) {
    for (const std::int64_t n : {1, 16, 17, 1024, 1312, 5632, 32000}) {
      for (const std::int64_t k : {4, 1024, 4096, 4100, 32768}) {
        for (const int num_sms : {1, 66, 114, 132}) {
          const GemvPlan plan = plan_gemv(m, n, k, false, num_sms);
          const std::int64_t tiles = (n + 15) / 16;
          ASSERT_GE(std::int64_t{plan.row_blocks} * plan.row_tiles * 8, m);
          ASSERT_LE(plan.parts, tiles);
          ASSERT_GE(std::int64_t{plan.parts} * plan.output_tiles, tiles) << m << " " << n;
          ASSERT_LE(std::int64_t{plan.parts} * plan.row_blocks,
                    std::int64_t{plan.together} * num_sms);
        }
      }
    }
  }
}

TEST(GemvPlan, KeepsEveryMultiprocessorBusy) {
  EXPECT_EQ(plan_gemv(16, 4096, 4096, false, kH200).parts, kH200);
  EXPECT_EQ(plan_gemv(32, 4096, 4096, false, kH200).parts, kH200);  // twice, for 16 rows each
  EXPECT_EQ(plan_gemv(8, 1312, 1024, false, kH200).parts, 82);      // a tile is the least
}

TEST(GemvPlan, LeavesLargeProductsToWgmma) {
  EXPECT_TRUE(gemv_beats_wgmma(256, 1024, false, kH200));
  EXPECT_TRUE(gemv_beats_wgmma(64, 4096, false, kH200));
  EXPECT_FALSE(gemv_beats_wgmma(96, 4096, false, kH200));
  EXPECT_FALSE(gemv_beats_wgmma(48, 8192, false, kH200));
  EXPECT_TRUE(gemv_beats_wgmma(128, 1024, true, kH200));
  EXPECT_FALSE(gemv_beats_wgmma(192, 1024, true, kH200));
}

}  // namespace
}  // namespace tinylm::cuda
