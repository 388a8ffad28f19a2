// Integer products with 256-bit vectors: AVX2, or AVX-VNNI where __AVXVNNI__ is defined.
#pragma once

#include "kernel_table.h"
#include "sink.inc.h"

namespace tinylm::cpu {
namespace {

TINYLM_INLINE __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

TINYLM_INLINE __m256i splat_four(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

TINYLM_INLINE i32x16 join(__m256i a, __m256i b) {
  i32x16 r;
  memcpy(&r, &a, 32);
  memcpy(reinterpret_cast<char*>(&r) + 32, &b, 32);
  return r;
}

/// The four codes of each byte, one lane at a time.
template <int kLane>
TINYLM_INLINE __m256i codes(__m256i bytes) {
  return _mm256_and_si256(_mm256_srli_epi16(bytes, 2 * kLane), _mm256_set1_epi8(3));
}

// Four products a lane of int32; or, without VNNI, two a lane of int16, of which 60 fit: a pair of
// products of a code is at most 512.
#if defined(__AVXVNNI__)
constexpr int64_t kGroupsAtOnce = INT64_MAX / 2;
TINYLM_INLINE __m256i add_products(__m256i part, __m256i codes, __m256i x) {
  return _mm256_dpbusd_avx_epi32(part, codes, x);
}
TINYLM_INLINE __m256i to_int32(__m256i part) { return part; }
#else
constexpr int64_t kGroupsAtOnce = 15;
TINYLM_INLINE __m256i add_products(__m256i part, __m256i codes, __m256i x) {
  return _mm256_add_epi16(part, _mm256_maddubs_epi16(codes, x));
}
TINYLM_INLINE __m256i to_int32(__m256i part) {
  return _mm256_madd_epi16(part, _mm256_set1_epi16(1));
}
#endif

/// `kRows` activation rows times one block.
template <int kRows>
TINYLM_INLINE void ternary_tile(const uint8_t* base, int64_t groups, const int8_t* q, int64_t ldq,
                                const Sink& sink, int64_t row, int64_t block) {
  __m256i total[kRows][2];
  for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm256_setzero_si256();
  for (int64_t start = 0; start < groups; start += kGroupsAtOnce) {
    const int64_t end = groups - start < kGroupsAtOnce ? groups : start + kGroupsAtOnce;
    __m256i part[kRows][2];
    for (int r = 0; r < kRows; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
    for (int64_t group = start; group < end; ++group) {
      const __m256i a = load256(base + group * kGroupBytes);
      const __m256i b = load256(base + group * kGroupBytes + 32);
      const __m256i lanes[4][2] = {{codes<0>(a), codes<0>(b)},
                                   {codes<1>(a), codes<1>(b)},
                                   {codes<2>(a), codes<2>(b)},
                                   {codes<3>(a), codes<3>(b)}};
      for (int r = 0; r < kRows; ++r) {
        for (int lane = 0; lane < 4; ++lane) {
          const __m256i x = splat_four(q + r * ldq + 16 * group + 4 * lane);
          for (int h = 0; h < 2; ++h) part[r][h] = add_products(part[r][h], lanes[lane][h], x);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < 2; ++h) {
        total[r][h] = _mm256_add_epi32(total[r][h], to_int32(part[r][h]));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) emit(sink, row + r, block, join(total[r][0], total[r][1]));
}

constexpr int kAvx2Rows = 2;

void dot_ternary(const DotParams& p, const Sink& sink) {
  const int64_t groups = p.k_pad / 16;
  for (int64_t block = p.first_block; block < p.last_block; ++block) {
    const uint8_t* base = p.weights + block * groups * kGroupBytes;
    int64_t row = 0;
    for (; row + kAvx2Rows <= p.m; row += kAvx2Rows) {
      ternary_tile<kAvx2Rows>(base, groups, p.q + row * p.ldq, p.ldq, sink, row, block);
    }
    for (; row < p.m; ++row) {
      ternary_tile<1>(base, groups, p.q + row * p.ldq, p.ldq, sink, row, block);
    }
  }
}

/// int8 weights are bytes up to 255, which overflow the int16 pairs of maddubs: widen first.
void dot_int8(const DotParams& p, const Sink& sink) {
  const int64_t groups = p.k_pad / 4;
  for (int64_t block = p.first_block; block < p.last_block; ++block) {
    const uint8_t* base = p.weights + block * groups * kGroupBytes;
    for (int64_t row = 0; row < p.m; ++row) {
      const int8_t* q = p.q + row * p.ldq;
#if defined(__AVXVNNI__)
      __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int64_t group = 0; group < groups; ++group) {
        const __m256i x = splat_four(q + 4 * group);
        for (int h = 0; h < 2; ++h) {
          const __m256i w = load256(base + group * kGroupBytes + 32 * h);
          total[h] = _mm256_dpbusd_avx_epi32(total[h], w, x);
        }
      }
      emit(sink, row, block, join(total[0], total[1]));
#else
      __m256i pairs[4];  // four weight rows each, two sums a row
      for (__m256i& v : pairs) v = _mm256_setzero_si256();
      for (int64_t group = 0; group < groups; ++group) {
        int32_t four;
        memcpy(&four, q + 4 * group, 4);
        const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
        for (int i = 0; i < 4; ++i) {
          const __m128i w = _mm_loadu_si128(
              reinterpret_cast<const __m128i*>(base + group * kGroupBytes + 16 * i));
          pairs[i] = _mm256_add_epi32(pairs[i], _mm256_madd_epi16(_mm256_cvtepu8_epi16(w), x));
        }
      }
      i32x16 total;
      for (int i = 0; i < 16; ++i) {
        const i32x8 v = bits<i32x8>(pairs[i / 4]);
        total[i] = v[2 * (i % 4)] + v[2 * (i % 4) + 1];
      }
      emit(sink, row, block, total);
#endif
    }
  }
}

}  // namespace
}  // namespace tinylm::cpu
