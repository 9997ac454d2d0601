/* The registers of an instruction set, and what the loops do with them. Every one of them gives the same bits. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* A register of LANES numbers: as integers VI, as floats VF, as bytes of weights VB. BLOCK rows of x share what is read of
 * TILES x 16 rows of weights, and these share what is read of x: 2 BLOCK x TILES x PARTS registers of sums. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
enum { LANES = 16, BLOCK = 4, TILES = 2 };
#elif defined(__AVX2__)
enum { LANES = 8, BLOCK = 4, TILES = 1 };
#else
enum { LANES = 4, BLOCK = 4, TILES = 1 };
#endif
enum { ROWS = 16, PARTS = ROWS / LANES }; /* 16 numbers are what a loop takes at a time everywhere, in so many registers */
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef float VF __attribute__((vector_size(4 * LANES)));
typedef uint8_t VB __attribute__((vector_size(4 * LANES)));

/* all(v): v in every lane; widen2 and widen1: whole numbers of two bytes and of one, as integers.
 * dot8(d, lo, hi, p, q): d plus the products of four columns `lo` with the four bytes at p and of four more `hi` with
 * those at q. `small`: weights below 32. */
INLINE int32_t four(const int8_t *p) {
    int32_t all;
    memcpy(&all, p, sizeof all);
    return all;
}
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
INLINE VI dot8(VI d, VB lo, VB hi, const int8_t *p, const int8_t *q, int small) {
    (void)small;
    __m512i sum = _mm512_dpbusd_epi32((__m512i)d, (__m512i)lo, _mm512_set1_epi32(four(p)));
    return (VI)_mm512_dpbusd_epi32(sum, (__m512i)hi, _mm512_set1_epi32(four(q)));
}
INLINE VF fma_(VF a, VF b, VF c) { return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE VF all(float v) { return (VF)_mm512_set1_ps(v); }
INLINE VI widen2(const uint16_t *p) { return (VI)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE VI widen1(const uint8_t *p) { return (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE VB look_up(const uint8_t table[16], VB at) {
    __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (VB)_mm512_shuffle_epi8(all, (__m512i)at);
}

#elif defined(__AVX2__)
#include <immintrin.h>
INLINE VI dot8(VI d, VB lo, VB hi, const int8_t *p, const int8_t *q, int small) {
    __m256i q0 = _mm256_set1_epi32(four(p)), q1 = _mm256_set1_epi32(four(q)), w0 = (__m256i)lo, w1 = (__m256i)hi;
#if defined(__AVXVNNI__) /* under AVX-512 the same instruction, encoded otherwise: so both can be tested on either */
    (void)small;
    return (VI)_mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32((__m256i)d, w0, q0), w1, q1);
#elif defined(__AVX512VNNI__)
    (void)small;
    return (VI)_mm256_dpbusd_epi32(_mm256_dpbusd_epi32((__m256i)d, w0, q0), w1, q1);
#else
    if (small) { /* four products of at most 31 x 128 fit 16 bits */
        __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w0, q0), _mm256_maddubs_epi16(w1, q1));
        return d + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    const __m256i even = _mm256_set1_epi16(255); /* two do not fit: columns 0 and 2, then 1 and 3, as 16 bits each */
    __m256i a = _mm256_madd_epi16(_mm256_and_si256(w0, even), _mm256_srai_epi16(_mm256_slli_epi16(q0, 8), 8));
    __m256i b = _mm256_madd_epi16(_mm256_srli_epi16(w0, 8), _mm256_srai_epi16(q0, 8));
    __m256i c = _mm256_madd_epi16(_mm256_and_si256(w1, even), _mm256_srai_epi16(_mm256_slli_epi16(q1, 8), 8));
    __m256i e = _mm256_madd_epi16(_mm256_srli_epi16(w1, 8), _mm256_srai_epi16(q1, 8));
    return d + (VI)_mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, e));
#endif
}
INLINE VF fma_(VF a, VF b, VF c) { return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE VF all(float v) { return (VF)_mm256_set1_ps(v); }
INLINE VI widen2(const uint16_t *p) { return (VI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE VI widen1(const uint8_t *p) { return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE VB look_up(const uint8_t table[16], VB at) {
    __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (VB)_mm256_shuffle_epi8(all, (__m256i)at);
}

#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
INLINE VI dot8(VI d, VB lo, VB hi, const int8_t *p, const int8_t *q, int small) { /* `sdot` wants both signed */
    int8x16_t q0 = vreinterpretq_s8_s32(vdupq_n_s32(four(p))), q1 = vreinterpretq_s8_s32(vdupq_n_s32(four(q)));
    int32x4_t sum = (int32x4_t)d;
    if (!small) { /* u = (u - 128) + 128 */
        int8x16_t all = vdupq_n_s8(64);
        lo ^= 128, hi ^= 128;
        sum = vdotq_s32(vdotq_s32(vdotq_s32(vdotq_s32(sum, all, q0), all, q0), all, q1), all, q1);
    }
    return (VI)vdotq_s32(vdotq_s32(sum, (int8x16_t)lo, q0), (int8x16_t)hi, q1);
}
INLINE VF fma_(VF a, VF b, VF c) { return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE VB look_up(const uint8_t table[16], VB at) { return (VB)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)at); }

#else /* plain C: what the others are held to */
INLINE VI dot8(VI d, VB lo, VB hi, const int8_t *p, const int8_t *q, int small) {
    (void)small;
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) d[i] += lo[4 * i + j] * p[j] + hi[4 * i + j] * q[j];
    return d;
}
INLINE VF fma_(VF a, VF b, VF c) {
    for (int i = 0; i < LANES; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
INLINE VB look_up(const uint8_t table[16], VB at) {
    for (int i = 0; i < 4 * LANES; i++) at[i] = table[at[i]];
    return at;
}
#endif

#if !defined(__AVX2__)
INLINE VF all(float v) { return (VF){v, v, v, v}; }
INLINE VI widen2(const uint16_t *p) { return (VI){p[0], p[1], p[2], p[3]}; }
INLINE VI widen1(const uint8_t *p) { return (VI){p[0], p[1], p[2], p[3]}; }
#endif

INLINE VF load(const float *p) {
    VF v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE VF load_bfloat16(const uint16_t *p) { return (VF)(widen2(p) << 16); }

/* E4M3 but for its NaN: its seven bits where those of a float32 are, whose exponents count from 120 more. */
INLINE VF load_e4m3(const int8_t *p) { return (VF)((widen1((const uint8_t *)p) << 24 >> 4) & (int32_t)0x87f00000) * 0x1p120f; }

INLINE VF pick(VI mask, VF yes, VF no) { return (VF)((mask & (VI)yes) | (~mask & (VI)no)); }

INLINE void store(float *p, VF v) { memcpy(p, &v, sizeof v); }

/* `n` < 16 numbers, filled up with zeros, as memory for `load`. */
INLINE void load_few(float to[ROWS], const float *from, int64_t n) {
    memset(to, 0, ROWS * sizeof *to);
    memcpy(to, from, (size_t)n * sizeof *to);
}

/* The sum of 16 lanes, in one order. */
INLINE float add_lanes(const VF v[PARTS]) {
    float a[ROWS];
    memcpy(a, v, sizeof a);
    for (int n = ROWS / 2; n; n /= 2)
        for (int i = 0; i < n; i++) a[i] += a[i + n];
    return a[0];
}

/* e to the v: 2^n e^r with |r| < 0.35 and a polynomial (Cephes' expf), 2 units in the last place; NaN stays NaN. */
INLINE VF exp_(VF v) {
    const VF magic = all(12582912.0f); /* 1.5 x 2^23: adding it rounds to an integer */
    v = pick(v < all(-87.0f), all(-87.0f), v);
    v = pick(v > all(88.0f), all(88.0f), v);
    const VF n = fma_(v, all(1.44269504f), magic) - magic;
    VF r = fma_(n, all(-0.693359375f), v);
    r = fma_(n, all(2.12194440e-4f), r);
    VF p = fma_(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
    p = fma_(p, r, all(8.3334519073e-3f));
    p = fma_(p, r, all(4.1665795894e-2f));
    p = fma_(p, r, all(1.6666665459e-1f));
    p = fma_(p, r, all(5.0000001201e-1f));
    p = fma_(p, r * r, r + 1.0f);
    return p * (VF)((__builtin_convertvector(n, VI) + 127) << 23);
}
