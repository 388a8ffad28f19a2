// The kernels of one family: compiled once for each, with its instructions and with
// TINYLM_FAMILY_TABLE naming the function that hands them out.

#include "attend.inc.h"
#include "decode.inc.h"
#include "rows.inc.h"
#include "wide.inc.h"

#if defined(__AMX_INT8__)
#include "decode_amx.inc.h"
#include "dot_amx.inc.h"
#elif defined(__AVX512VNNI__)
#include "dot_avx512.inc.h"
#elif defined(__AVX2__)
#include "dot_avx2.inc.h"
#else
#include "dot_portable.inc.h"
#endif

namespace tinylm::cpu {

#if defined(__AVX512VBMI__)
constexpr auto to_digits = to_digits_vbmi;
#else
constexpr auto to_digits = to_digits_loop;
#endif

const KernelTable& TINYLM_FAMILY_TABLE() {
  static const KernelTable table = {
      dot_ternary, dot_int8,  quantize_int8, quantize_fp8,       finish_fp8,
      swiglu,      widen_all, narrow_all,    largest_magnitude,  to_digits,
      from_digits, attend,    decode,        decode_takes_tiles,
  };
  return table;
}

}  // namespace tinylm::cpu
