// What the loops of cpu_loops.h need of an instruction set: `Floats`, kWidth fp32 numbers with + - * /, their loads
// and stores in three dtypes, square roots, and `Squares`, as many fp64 sums. Rounding is to nearest, ties to even;
// NaNs stay NaNs, denormal numbers stay what they are.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_adamw.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MEGALLM_X86 1
#include <immintrin.h>
#endif

namespace megallm::cpu::plain {

constexpr int kWidth = 1;
using Floats = float;

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float fill(float x) { return x; }
inline float root(float x) { return std::sqrt(x); }

inline float load(const float* at) { return *at; }
inline float load(const Bfloat* at) { return from_bits(static_cast<uint32_t>(at->bits) << 16); }
inline float load(const Half* at) {
  const uint32_t sign = (at->bits & 0x8000u) << 16, rest = at->bits & 0x7fffu;
  if (rest >= 0x7c00u) {  // infinite, or NaN, made quiet
    return from_bits(sign | 0x7f800000u | rest << 13 | (rest > 0x7c00u ? 0x400000u : 0u));
  }
  if (rest >= 0x400u) return from_bits(sign | ((rest << 13) + (112u << 23)));
  return from_bits(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
}

inline void store(float* at, float x) { *at = x; }
inline void store(Bfloat* at, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  at->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void store(Half* at, float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, rest = bits_of(x) & 0x7fffffffu;
  uint32_t out;
  if (rest > 0x7f800000u) {
    out = 0x7e00u | (rest >> 13 & 0x1ffu);
  } else if (rest >= 0x477ff000u) {  // 65520, half way between the largest number and what would follow
    out = 0x7c00u;
  } else if (rest >= 0x38800000u) {  // 2^-14
    out = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  } else {  // a multiple of 2^-24: the sum rounds, and its last bits are that multiple
    out = bits_of(from_bits(rest) + 0.5f) - bits_of(0.5f);
  }
  at->bits = static_cast<uint16_t>(sign | out);
}

// Two stores at once, past the cache where there is a way; `at` is a multiple of kStreamBytes.
constexpr uintptr_t kStreamBytes = 4;
template <typename C>
void stream(C* at, Floats low, Floats high) {
  store(at, low);
  store(at + 1, high);
}
inline void end_streams() {}

struct Squares {
  double sum = 0;
  void add(float x) { sum += static_cast<double>(x) * static_cast<double>(x); }
  void store(double* at) const { *at = sum; }
};

}  // namespace megallm::cpu::plain

#ifdef MEGALLM_X86
#ifdef __clang__
#define MEGALLM_TARGET_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define MEGALLM_TARGET_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq\"))), apply_to = function)")
#define MEGALLM_TARGET_END _Pragma("clang attribute pop")
#else
#define MEGALLM_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define MEGALLM_TARGET_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq\")")
#define MEGALLM_TARGET_END _Pragma("GCC pop_options")
#endif

MEGALLM_TARGET_AVX2
namespace megallm::cpu::avx2 {

constexpr int kWidth = 8;
using Floats = __m256;

inline Floats fill(float x) { return _mm256_set1_ps(x); }
inline Floats root(Floats x) { return _mm256_sqrt_ps(x); }
inline __m128i load_16_bit(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }

inline Floats load(const float* at) { return _mm256_loadu_ps(at); }
inline Floats load(const Bfloat* at) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bit(at)), 16));
}
inline Floats load(const Half* at) { return _mm256_cvtph_ps(load_16_bit(at)); }

inline void store(float* at, Floats x) { _mm256_storeu_ps(at, x); }
inline __m128i to_bfloat(Floats x) {
  const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
  const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(_mm256_srli_epi32(bits, 16), one));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i out = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
}
inline __m128i to_half(Floats x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline void store(Bfloat* at, Floats x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), to_bfloat(x)); }
inline void store(Half* at, Floats x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), to_half(x)); }

constexpr uintptr_t kStreamBytes = 32;
inline void end_streams() { _mm_sfence(); }
inline void stream(Bfloat* at, Floats low, Floats high) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(at), _mm256_set_m128i(to_bfloat(high), to_bfloat(low)));
}
inline void stream(Half* at, Floats low, Floats high) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(at), _mm256_set_m128i(to_half(high), to_half(low)));
}

struct Squares {
  Squares() : low(_mm256_setzero_pd()), high(_mm256_setzero_pd()) {}
  // The product of two fp32 numbers is exact in fp64: this rounds once, as a product and a sum do.
  void add(Floats x) {
    const __m256d first = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    const __m256d second = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    low = _mm256_fmadd_pd(first, first, low);
    high = _mm256_fmadd_pd(second, second, high);
  }
  void store(double* at) const {
    _mm256_storeu_pd(at, low);
    _mm256_storeu_pd(at + 4, high);
  }
  __m256d low, high;
};

}  // namespace megallm::cpu::avx2
MEGALLM_TARGET_END

MEGALLM_TARGET_AVX512
namespace megallm::cpu::avx512 {

constexpr int kWidth = 16;
using Floats = __m512;

inline Floats fill(float x) { return _mm512_set1_ps(x); }
inline Floats root(Floats x) { return _mm512_sqrt_ps(x); }
inline __m256i load_16_bit(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

inline Floats load(const float* at) { return _mm512_loadu_ps(at); }
inline Floats load(const Bfloat* at) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16_bit(at)), 16));
}
inline Floats load(const Half* at) { return _mm512_cvtph_ps(load_16_bit(at)); }

inline void store(float* at, Floats x) { _mm512_storeu_ps(at, x); }
inline __m256i to_bfloat(Floats x) {  // AVX512_BF16 has an instruction for it, which takes denormals for zero
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(bits, 16), one));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(out);
}
inline __m256i to_half(Floats x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline void store(Bfloat* at, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), to_bfloat(x)); }
inline void store(Half* at, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), to_half(x)); }

constexpr uintptr_t kStreamBytes = 64;
inline void end_streams() { _mm_sfence(); }
inline __m512i joined(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
inline void stream(Bfloat* at, Floats low, Floats high) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(at), joined(to_bfloat(low), to_bfloat(high)));
}
inline void stream(Half* at, Floats low, Floats high) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(at), joined(to_half(low), to_half(high)));
}

struct Squares {
  Squares() : low(_mm512_setzero_pd()), high(_mm512_setzero_pd()) {}
  void add(Floats x) {  // as avx2
    const __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    low = _mm512_fmadd_pd(first, first, low);
    high = _mm512_fmadd_pd(second, second, high);
  }
  void store(double* at) const {
    _mm512_storeu_pd(at, low);
    _mm512_storeu_pd(at + 8, high);
  }
  __m512d low, high;
};

}  // namespace megallm::cpu::avx512
MEGALLM_TARGET_END
#endif
