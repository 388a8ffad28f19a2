// How products of many rows are cut on Hopper: plain arithmetic, so it needs no GPU.
#include <gtest/gtest.h>

#include "../kernels/cuda/product_plan.h"

namespace tinylm::cuda {
namespace {

constexpr int kH100 = 132;  // multiprocessors

std::int64_t thread_blocks(const ProductPlan& plan, std::int64_t m, std::int64_t n) {
  return (m + plan.rows - 1) / plan.rows * ((n + kPlanOutputs - 1) / kPlanOutputs) * plan.k_parts;
}

TEST(ProductPlan, IsTheFastestThatWasMeasured) {
  constexpr ProductPlan kWide{128, 1, Tiling::kWide}, kTurns{128, 1, Tiling::kTurns};
  EXPECT_EQ(plan_product(2048, 8192, 8192, kH100), kWide);
  EXPECT_EQ(plan_product(2048, 4096, 4096, kH100), kWide);
  EXPECT_EQ(plan_product(2048, 5632, 1024, kH100), kTurns);
  EXPECT_EQ(plan_product(2048, 2816, 1024, kH100), kTurns);
  EXPECT_EQ(plan_product(2048, 1024, 2816, kH100), kTurns);
  EXPECT_EQ(plan_product(2048, 1024, 1024, kH100), kTurns);
  EXPECT_EQ(plan_product(512, 8192, 8192, kH100), kWide);
  EXPECT_EQ(plan_product(256, 8192, 8192, kH100), kTurns);
  EXPECT_EQ(plan_product(512, 4096, 4096, kH100), kTurns);
  EXPECT_EQ(plan_product(256, 4096, 4096, kH100), (ProductPlan{128, 2}));
  EXPECT_EQ(plan_product(64, 8192, 8192, kH100), (ProductPlan{64, 2}));
  EXPECT_EQ(plan_product(64, 4096, 4096, kH100), (ProductPlan{64, 2}));
  EXPECT_EQ(plan_product(64, 1024, 1024, kH100), (ProductPlan{64, 4}));
}

TEST(ProductPlan, HasAKernelForEveryShape) {
  for (const std::int64_t m : {33, 64, 65, 300, 2048, 100000}) {
    for (const std::int64_t n : {1, 16, 129, 1024, 5632, 32000}) {
      for (const std::int64_t k : {4, 128, 132, 1024, 2816, 32768}) {
        for (const int num_sms : {1, 66, 114, 132}) {
          const ProductPlan plan = plan_product(m, n, k, num_sms);
          EXPECT_TRUE(valid_plan(plan, k)) << m << " " << n << " " << k << " " << num_sms;
        }
      }
    }
  }
}

TEST(ProductPlan, PartsOfKOnlyWhereTheirThreadBlocksRunAtOnce) {
  for (const std::int64_t m : {33, 100, 256, 2048}) {
    for (const std::int64_t n : {128, 1024, 2816, 8192}) {
      const ProductPlan plan = plan_product(m, n, 4096, kH100);
      if (plan.k_parts > 1) {
        EXPECT_LE(thread_blocks(plan, m, n), kH100) << m << " " << n;
      }
    }
  }
}

TEST(ProductPlan, RefusesWhatHasNoKernel) {
  EXPECT_FALSE(valid_plan({32, 1}, 1024));
  EXPECT_FALSE(valid_plan({128, 0}, 1024));
  EXPECT_FALSE(valid_plan({128, 2 * kMaxParts}, 8192));
  EXPECT_FALSE(valid_plan({256, 1, Tiling::kWide}, 1024));
  EXPECT_FALSE(valid_plan({128, 2, Tiling::kTurns}, 1024));
  EXPECT_FALSE(valid_plan({128, 2}, 128));  // a part would have no inputs
  EXPECT_TRUE(valid_plan({128, 2}, 132));
}

}  // namespace
}  // namespace tinylm::cuda
