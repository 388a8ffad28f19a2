// Integer products with int8 tiles, for many activation rows; few go to AVX-512 VNNI.
//
// Two blocks of weights are unpacked to bytes for the whole of K (the panel, in the cache nearest
// to the core), and every tile of activations passes over them: 32 rows x 32 outputs at a time in
// four tiles of sums.
#pragma once

#include "dot_avx512.inc.h"

namespace tinylm::cpu {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
/// Below it, a tile would be mostly empty.
constexpr int64_t kMinTileRows = 9;

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/// Tile registers hold state that slows the core down until they are released.
class Tiles {
 public:
  Tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

/// Unpacks `count` inputs of one block into tiles of 64 inputs x 16 rows, every other kTileBytes.
TINYLM_INLINE void unpack_block(const uint8_t* block, int64_t count, int8_t* panel) {
  const __m512i mask = _mm512_set1_epi8(3);
  for (int64_t group = 0; group < count / 16; ++group) {
    __m512i bytes = _mm512_loadu_si512(block + group * kGroupBytes);
    int8_t* out = panel + group / 4 * 2 * kTileBytes + group % 4 * 256;
    for (int lane = 0; lane < 4; ++lane) {
      _mm512_store_si512(out + 64 * lane, _mm512_and_si512(bytes, mask));
      bytes = _mm512_srli_epi16(bytes, 2);
    }
  }
}

TINYLM_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

TINYLM_INLINE void store_sums(int32_t* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

/// Weights as the tiles take them: 64 inputs of a block, then of the one beside it.
struct Panel {
  const uint8_t* data;
  int64_t stride;  // from 64 inputs to the next
  int64_t second;  // to the second block
};

/// Writes the sums of up to 32 rows: tiles of 16 x 16, blocks side by side, rows one below the
/// other.
template <bool kWide>
TINYLM_INLINE void emit_tiles(const DotParams& p, int64_t row, int64_t most, int64_t block,
                              const int32_t* sums, const Sink& sink) {
  const int64_t rows = p.m - row < most ? p.m - row : most;
  if (plain(sink, block + (kWide ? 2 : 1))) {
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* at = sums + r / 16 * 512 + r % 16 * 16;
      emit_float(sink, row + r, block, load<i32x16>(at));
      if (kWide) emit_float(sink, row + r, block + 1, load<i32x16>(at + 256));
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* at = sums + r / 16 * 512 + r % 16 * 16;
    emit(sink, row + r, block, load<i32x16>(at));
    if (kWide) emit(sink, row + r, block + 1, load<i32x16>(at + 256));
  }
}

/// Adds `count` inputs of 32 activation rows to tiles 0 to 3: rows 0 and block 0, 0 and 1, 1 and 0,
/// 1 and 1. Activations stream past the nearest cache, so that the panel stays in it.
template <bool kWide>
TINYLM_INLINE void add_high(const Panel& panel, const int8_t* a, int64_t lda, int64_t count) {
  const uint8_t* b = panel.data;
  for (int64_t k = 0; k < count; k += kInputAlign) {
    _tile_stream_loadd(4, a + k, lda);
    _tile_loadd(6, b, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_stream_loadd(5, a + kTileRows * lda + k, lda);
    _tile_dpbsud(2, 5, 6);
    if (kWide) {
      _tile_loadd(7, b + panel.second, 64);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(3, 5, 7);
    }
    b += panel.stride;
  }
}

/// Adds `count` inputs of 16 activation rows: even steps to tiles 0 and 1, odd ones to 2 and 3,
/// because a sum takes three steps' time to come out of the multiplier.
template <bool kWide>
TINYLM_INLINE void add_low(const Panel& panel, const int8_t* a, int64_t lda, int64_t count) {
  const uint8_t* b = panel.data;
  for (int64_t k = 0; k < count; k += 2 * kInputAlign) {
    _tile_loadd(4, a + k, lda);
    _tile_loadd(6, b, 64);
    _tile_dpbsud(0, 4, 6);
    if (kWide) {
      _tile_loadd(7, b + panel.second, 64);
      _tile_dpbsud(1, 4, 7);
    }
    b += panel.stride;
    if (k + kInputAlign == count) break;
    _tile_loadd(5, a + k + kInputAlign, lda);
    _tile_loadd(6, b, 64);
    _tile_dpbsud(2, 5, 6);
    if (kWide) {
      _tile_loadd(7, b + panel.second, 64);
      _tile_dpbsud(3, 5, 7);
    }
    b += panel.stride;
  }
}

template <bool kWide>
TINYLM_INLINE void finish_high(const DotParams& p, int64_t row, int64_t block, int32_t* sums,
                               const Sink& sink) {
  store_sums(sums);
  emit_tiles<kWide>(p, row, 2 * kTileRows, block, sums, sink);
}

template <bool kWide>
TINYLM_INLINE void finish_low(const DotParams& p, int64_t row, int64_t block, int32_t* sums,
                              const Sink& sink) {
  store_sums(sums);
  for (int64_t i = 0; i < 512; i += 16) {
    store(sums + i, load<i32x16>(sums + i) + load<i32x16>(sums + 512 + i));
  }
  emit_tiles<kWide>(p, row, kTileRows, block, sums, sink);
}

/// All activation rows times a panel of the whole of K.
template <bool kWide>
TINYLM_INLINE void tile_rows(const Panel& panel, const DotParams& p, int64_t block,
                             const Sink& sink) {
  alignas(64) int32_t sums[1024];
  int64_t row = 0;
  for (; p.m - row > kTileRows; row += 2 * kTileRows) {
    zero_sums();
    add_high<kWide>(panel, p.q + row * p.ldq, p.ldq, p.k_pad);
    finish_high<kWide>(p, row, block, sums, sink);
  }
  if (row < p.m) {
    zero_sums();
    add_low<kWide>(panel, p.q + row * p.ldq, p.ldq, p.k_pad);
    finish_low<kWide>(p, row, block, sums, sink);
  }
}

/// Unpacks `count` inputs from `k` on, of one block or two.
template <bool kWide>
TINYLM_INLINE Panel unpack(const DotParams& p, int64_t block, int64_t k, int64_t count) {
  const int64_t bytes = p.k_pad / 16 * kGroupBytes;
  const uint8_t* weights = p.weights + block * bytes + k / 16 * kGroupBytes;
  unpack_block(weights, count, p.panel);
  if (kWide) unpack_block(weights + bytes, count, p.panel + kTileBytes);
  return {reinterpret_cast<const uint8_t*>(p.panel), 2 * kTileBytes, kTileBytes};
}

/// Up to 32 activation rows: the panel is made a few inputs at a time and the sums stay in their
/// tiles, so that nothing leaves the nearest cache.
template <bool kWide>
TINYLM_INLINE void few_rows(const DotParams& p, int64_t block, const Sink& sink) {
  constexpr int64_t kInputsAtOnce = 256;
  alignas(64) int32_t sums[1024];
  zero_sums();
  for (int64_t k = 0; k < p.k_pad; k += kInputsAtOnce) {
    const int64_t count = p.k_pad - k < kInputsAtOnce ? p.k_pad - k : kInputsAtOnce;
    const Panel panel = unpack<kWide>(p, block, k, count);
    if (p.m > kTileRows) {
      add_high<kWide>(panel, p.q + k, p.ldq, count);
    } else {
      add_low<kWide>(panel, p.q + k, p.ldq, count);
    }
  }
  if (p.m > kTileRows) {
    finish_high<kWide>(p, 0, block, sums, sink);
  } else {
    finish_low<kWide>(p, 0, block, sums, sink);
  }
}

template <bool kWide>
TINYLM_INLINE void ternary_blocks(const DotParams& p, int64_t block, const Sink& sink) {
  if (p.m <= 2 * kTileRows) {
    few_rows<kWide>(p, block, sink);
  } else {
    tile_rows<kWide>(unpack<kWide>(p, block, 0, p.k_pad), p, block, sink);
  }
}

void dot_ternary(const DotParams& p, const Sink& sink) {
  if (p.m < kMinTileRows) return dot_ternary_vnni(p, sink);
  const Tiles tiles;
  int64_t block = p.first_block;
  for (; block + 2 <= p.last_block; block += 2) ternary_blocks<true>(p, block, sink);
  if (block < p.last_block) ternary_blocks<false>(p, block, sink);
}

/// int8 weights lie in memory as the tiles want them.
void dot_int8(const DotParams& p, const Sink& sink) {
  if (p.m < kMinTileRows) return dot_int8_vnni(p, sink);
  const Tiles tiles;
  const int64_t bytes = p.k_pad / 4 * kGroupBytes;
  for (int64_t block = p.first_block; block < p.last_block; block += 2) {
    const Panel panel = {p.weights + block * bytes, kTileBytes, bytes};
    if (block + 1 < p.last_block) {
      tile_rows<true>(panel, p, block, sink);
    } else {
      tile_rows<false>(panel, p, block, sink);
    }
  }
}

}  // namespace
}  // namespace tinylm::cpu
