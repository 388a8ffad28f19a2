// Integer products with AVX-512 VNNI.
#pragma once

#include "kernel_table.h"
#include "sink.inc.h"

namespace tinylm::cpu {
namespace {

TINYLM_INLINE __m512i splat_four(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

/// One activation row times `kBlocks` blocks. The codes stay where they are in the bytes: lane l
/// then counts 4**l times, which a shift of its own sum takes back, and no code needs a shift.
template <int kBlocks>
TINYLM_INLINE void ternary_row(const uint8_t* base, int64_t groups, const int8_t* q,
                               const Sink& sink, int64_t row, int64_t block) {
  const __m512i mask[4] = {_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0C), _mm512_set1_epi8(0x30),
                           _mm512_set1_epi8(static_cast<char>(0xC0))};
  __m512i total[kBlocks][4];
  for (int b = 0; b < kBlocks; ++b) {
    for (int lane = 0; lane < 4; ++lane) total[b][lane] = _mm512_setzero_si512();
  }
  const int64_t stride = groups * kGroupBytes;
  for (int64_t group = 0; group < groups; ++group) {
    __m512i x[4];
    for (int lane = 0; lane < 4; ++lane) x[lane] = splat_four(q + 16 * group + 4 * lane);
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i bytes = _mm512_loadu_si512(base + b * stride + group * kGroupBytes);
      for (int lane = 0; lane < 4; ++lane) {
        total[b][lane] =
            _mm512_dpbusd_epi32(total[b][lane], _mm512_and_si512(bytes, mask[lane]), x[lane]);
      }
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const __m512i low = _mm512_add_epi32(total[b][0], _mm512_srai_epi32(total[b][1], 2));
    const __m512i high =
        _mm512_add_epi32(_mm512_srai_epi32(total[b][2], 4), _mm512_srai_epi32(total[b][3], 6));
    emit(sink, row, block + b, (i32x16)_mm512_add_epi32(low, high));
  }
}

/// `kRows` activation rows times two blocks (or one).
template <int kRows, int kBlocks>
TINYLM_INLINE void ternary_tile(const uint8_t* base, int64_t groups, const int8_t* q, int64_t ldq,
                                const Sink& sink, int64_t row, int64_t block) {
  const __m512i mask = _mm512_set1_epi8(3);
  __m512i total[kRows][kBlocks];
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) total[r][b] = _mm512_setzero_si512();
  }
  const int64_t stride = groups * kGroupBytes;
  for (int64_t group = 0; group < groups; ++group) {
    __m512i bytes[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      bytes[b] = _mm512_loadu_si512(base + b * stride + group * kGroupBytes);
    }
    for (int lane = 0; lane < 4; ++lane) {
      __m512i codes[kBlocks];
      for (int b = 0; b < kBlocks; ++b) {
        codes[b] = _mm512_and_si512(bytes[b], mask);
        bytes[b] = _mm512_srli_epi16(bytes[b], 2);
      }
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = splat_four(q + r * ldq + 16 * group + 4 * lane);
        for (int b = 0; b < kBlocks; ++b) {
          total[r][b] = _mm512_dpbusd_epi32(total[r][b], codes[b], x);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) emit(sink, row + r, block + b, (i32x16)total[r][b]);
  }
}

template <int kBlocks>
TINYLM_INLINE void ternary_rows(const DotParams& p, const Sink& sink, int64_t block) {
  const int64_t groups = p.k_pad / 16;
  const uint8_t* base = p.weights + block * groups * kGroupBytes;
  int64_t row = 0;
  for (; row + 8 <= p.m; row += 8) {
    ternary_tile<8, kBlocks>(base, groups, p.q + row * p.ldq, p.ldq, sink, row, block);
  }
  for (; row + 4 <= p.m; row += 4) {
    ternary_tile<4, kBlocks>(base, groups, p.q + row * p.ldq, p.ldq, sink, row, block);
  }
  for (; row + 2 <= p.m; row += 2) {
    ternary_tile<2, kBlocks>(base, groups, p.q + row * p.ldq, p.ldq, sink, row, block);
  }
  if (row < p.m) {
    ternary_row<kBlocks>(base, groups, p.q + row * p.ldq, sink, row, block);
  }
}

void dot_ternary_vnni(const DotParams& p, const Sink& sink) {
  int64_t block = p.first_block;
  if (p.m == 1) {
    const int64_t groups = p.k_pad / 16;
    for (; block + 4 <= p.last_block; block += 4) {
      ternary_row<4>(p.weights + block * groups * kGroupBytes, groups, p.q, sink, 0, block);
    }
  }
  for (; block + 2 <= p.last_block; block += 2) ternary_rows<2>(p, sink, block);
  if (block < p.last_block) ternary_rows<1>(p, sink, block);
}

/// `kRows` activation rows times `kBlocks` blocks of int8 weights.
template <int kRows, int kBlocks>
TINYLM_INLINE void int8_tile(const uint8_t* base, int64_t groups, const int8_t* q, int64_t ldq,
                             const Sink& sink, int64_t row, int64_t block) {
  __m512i total[kRows][kBlocks];
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) total[r][b] = _mm512_setzero_si512();
  }
  const int64_t stride = groups * kGroupBytes;
  for (int64_t group = 0; group < groups; ++group) {
    __m512i w[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      w[b] = _mm512_loadu_si512(base + b * stride + group * kGroupBytes);
    }
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = splat_four(q + r * ldq + 4 * group);
      for (int b = 0; b < kBlocks; ++b) total[r][b] = _mm512_dpbusd_epi32(total[r][b], w[b], x);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) emit(sink, row + r, block + b, (i32x16)total[r][b]);
  }
}

template <int kBlocks>
TINYLM_INLINE void int8_rows(const DotParams& p, const Sink& sink, int64_t block) {
  const int64_t groups = p.k_pad / 4;
  const uint8_t* base = p.weights + block * groups * kGroupBytes;
  int64_t row = 0;
  for (; row + 4 <= p.m; row += 4) {
    int8_tile<4, kBlocks>(base, groups, p.q + row * p.ldq, p.ldq, sink, row, block);
  }
  for (; row < p.m; ++row) {
    int8_tile<1, kBlocks>(base, groups, p.q + row * p.ldq, p.ldq, sink, row, block);
  }
}

void dot_int8_vnni(const DotParams& p, const Sink& sink) {
  int64_t block = p.first_block;
  for (; block + 4 <= p.last_block; block += 4) int8_rows<4>(p, sink, block);
  for (; block < p.last_block; ++block) int8_rows<1>(p, sink, block);
}

#if !defined(__AMX_INT8__)
void dot_ternary(const DotParams& p, const Sink& sink) { dot_ternary_vnni(p, sink); }
void dot_int8(const DotParams& p, const Sink& sink) { dot_int8_vnni(p, sink); }
#endif

}  // namespace
}  // namespace tinylm::cpu
