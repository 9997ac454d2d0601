/* Linear layers on a CPU: y[m][n] = sum_k x[m][k] w[n][k] + bias[n], the weights of few bits.
 *
 * What is computed, on every machine to the same last bit:
 *
 *   inputs    a row of x is cut into spans of columns; each has a float scale a = amax / 127.5 (or one that is given)
 *             and codes q = clamp(round_half_even(x / a), -128, 127)
 *   products  integers within a span: d = sum (u - z) q in 32 bits, u >= 0 the stored weight, z its zero
 *   sums      y = fma(d, a s, y), span after span, s the scale of the weight's group; at the end y r + bias, r the
 *             scale of the row
 *
 * Every row of x is computed by itself: how many others there are, and how many threads, changes nothing.
 *
 * Weights lie in tiles of 16 rows, of each of which 4 columns lie together: 64 bytes are 16 rows x 4 columns, and an
 * instruction that adds four products to a 32-bit lane (`vpdpbusd`, `sdot`) meets them with 4 codes of x, broadcast.
 * Nothing is ever summed across a register, and the scales of the rows are a vector. 4-bit weights: the low halves of
 * 64 bytes are columns 0-3 of eight, the high halves columns 4-7.
 *
 * `cpu_build.py` compiles this file once for each instruction set, -DVARIANT=name (the loops over a tile), and once
 * without (rounding and sharing out the tiles), into one library.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

enum { ROWS = 16, QUAD = 64 }; /* rows of a tile; bytes of 16 rows x 4 columns */
enum { BITS8, BITS4, E2M1 };     /* what a weight is */

typedef struct {
    const uint8_t *codes; /* [tiles][columns / 8][QUAD * 2, of 4 bits QUAD] */
    const void *scales;   /* [tiles][groups][ROWS], float if scales_float, else bfloat16; NULL: 1 */
    const uint8_t *zeros; /* [tiles][groups][ROWS]; NULL: `zero` everywhere */
    const float *row;     /* [tiles][ROWS] */
    const float *bias;    /* [tiles][ROWS] */
    int64_t n, k, columns; /* columns: k, filled up to whole spans */
    int64_t group, span;   /* columns to a scale of w, and to one of x; a span lies in one group and is 8 j wide */
    int32_t kind, zero, scales_float;
    float input_scale; /* of all of x; 0: made from each span */
} Linear;

typedef struct { /* x of a call, rounded */
    int8_t *codes;        /* [m][columns] */
    float *scales;        /* [m][spans] */
    int32_t *corrections; /* [m][spans]: minus the sum of the codes, times `zero` where that is one for all */
} Input;

typedef void Tile(const Linear *w, int64_t tile, const Input *in, int64_t first, int64_t end, float *y);

#ifdef VARIANT /* ---------------------------------------------------------------- the loops over a tile */

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define INLINE static inline __attribute__((always_inline))

/* A register of LANES rows: as integers VI, as floats VF, as bytes of weights VB. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
enum { LANES = 16, BLOCK = 8 }; /* BLOCK: rows of x that share what is read of w; 2 BLOCK registers of sums */
#elif defined(__AVX2__)
enum { LANES = 8, BLOCK = 4 };
#else
enum { LANES = 4, BLOCK = 4 };
#endif
enum { PARTS = ROWS / LANES };
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef float VF __attribute__((vector_size(4 * LANES)));
typedef uint8_t VB __attribute__((vector_size(4 * LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));
typedef uint8_t VQ __attribute__((vector_size(LANES)));

/* dot8(d, lo, hi, q): d plus the products of four columns `lo` with q[0..3] and of four more `hi` with q[4..7].
 * `small`: weights below 32. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
INLINE VI dot8(VI d, VB lo, VB hi, const int32_t *q, int small) {
    (void)small;
    __m512i sum = _mm512_dpbusd_epi32((__m512i)d, (__m512i)lo, _mm512_set1_epi32(q[0]));
    return (VI)_mm512_dpbusd_epi32(sum, (__m512i)hi, _mm512_set1_epi32(q[1]));
}
INLINE VF fma_(VF a, VF b, VF c) { return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE VB look_up(const uint8_t table[16], VB at) {
    __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (VB)_mm512_shuffle_epi8(all, (__m512i)at);
}

#elif defined(__AVX2__)
#include <immintrin.h>
INLINE VI dot8(VI d, VB lo, VB hi, const int32_t *q, int small) {
    __m256i q0 = _mm256_set1_epi32(q[0]), q1 = _mm256_set1_epi32(q[1]), w0 = (__m256i)lo, w1 = (__m256i)hi;
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
INLINE VB look_up(const uint8_t table[16], VB at) {
    __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (VB)_mm256_shuffle_epi8(all, (__m256i)at);
}

#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
INLINE VI dot8(VI d, VB lo, VB hi, const int32_t *q, int small) { /* `sdot` wants both signed */
    int8x16_t q0 = vreinterpretq_s8_s32(vdupq_n_s32(q[0])), q1 = vreinterpretq_s8_s32(vdupq_n_s32(q[1]));
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
INLINE VI dot8(VI d, VB lo, VB hi, const int32_t *q, int small) {
    int8_t code[8];
    (void)small;
    memcpy(code, q, 8);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) d[i] += lo[4 * i + j] * code[j] + hi[4 * i + j] * code[4 + j];
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

INLINE VF load(const float *p) {
    VF v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE VF load_bfloat16(const uint16_t *p) {
    VH half;
    memcpy(&half, p, sizeof half);
    return (VF)(__builtin_convertvector(half, VI) << 16);
}

INLINE VI load_zeros(const uint8_t *p) {
    VQ few;
    memcpy(&few, p, sizeof few);
    return __builtin_convertvector(few, VI);
}

static const uint8_t e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; /* twice the value, + 12 */

/* `rows` rows of x from `first` on with one tile. `kind` and `rows` are constants where this is called. */
INLINE void codes(
    const int kind, const int rows, const Linear *w, int64_t tile, const Input *in, int64_t first, float *out) {
    const int64_t spans = w->columns / w->span, groups = (w->columns + w->group - 1) / w->group;
    const int64_t step = kind == BITS8 ? 2 * QUAD : QUAD; /* bytes of 8 columns */
    const uint8_t *code = w->codes + tile * (w->columns / 8) * step;
    VF sum[BLOCK][PARTS] = {0};
    for (int64_t s = 0; s < spans; s++) {
        const int64_t group = (tile * groups + s * w->span / w->group) * ROWS;
        VI dot[BLOCK][PARTS];
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++) {
                const int32_t correction = in->corrections[(first + r) * spans + s];
                dot[r][p] = w->zeros ? load_zeros(w->zeros + group + p * LANES) * correction : (VI){0} + correction;
            }
        for (int64_t c = s * w->span; c < (s + 1) * w->span; c += 8, code += step)
            for (int p = 0; p < PARTS; p++) {
                VB lo, hi;
                memcpy(&lo, code + p * sizeof lo, sizeof lo);
                if (kind == BITS8) {
                    memcpy(&hi, code + QUAD + p * sizeof hi, sizeof hi);
                } else {
                    hi = lo >> 4;
                    lo &= 15;
                }
                if (kind == E2M1) lo = look_up(e2m1, lo), hi = look_up(e2m1, hi);
                for (int r = 0; r < rows; r++) {
                    int32_t q[2];
                    memcpy(q, in->codes + (first + r) * w->columns + c, 8);
                    dot[r][p] = dot8(dot[r][p], lo, hi, q, kind != BITS8);
                }
            }
        for (int p = 0; p < PARTS; p++) {
            VF scale = (VF){0} + 1.0f;
            if (w->scales && w->scales_float) scale = load((const float *)w->scales + group + p * LANES);
            if (w->scales && !w->scales_float) scale = load_bfloat16((const uint16_t *)w->scales + group + p * LANES);
            for (int r = 0; r < rows; r++) {
                const VF both = scale * in->scales[(first + r) * spans + s];
                sum[r][p] = fma_(__builtin_convertvector(dot[r][p], VF), both, sum[r][p]);
            }
        }
    }
    for (int r = 0; r < rows; r++) memcpy(out + r * ROWS, sum[r], sizeof sum[r]);
}

#define OF(rows)                                                                \
    switch (w->kind) {                                                          \
    case BITS8: codes(BITS8, rows, w, tile, in, m, out); break;                 \
    case BITS4: codes(BITS4, rows, w, tile, in, m, out); break;                 \
    default: codes(E2M1, rows, w, tile, in, m, out);                            \
    }

/* Rows `first` to `end` of x with one tile, into their 16 columns of y. */
void JOIN(fewbit_tile_, VARIANT)(const Linear *w, int64_t tile, const Input *in, int64_t first, int64_t end, float *y) {
    float out[BLOCK * ROWS];
    const int64_t at = tile * ROWS, count = w->n - at < ROWS ? w->n - at : ROWS;
    for (int64_t m = first, rows; m < end; m += rows) {
        rows = end - m >= BLOCK ? BLOCK : end - m >= 4 ? 4 : end - m >= 2 ? 2 : 1;
        if (rows == BLOCK) OF(BLOCK)
        else if (rows == 4) OF(4)
        else if (rows == 2) OF(2)
        else OF(1)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i++)
                y[(m + r) * w->n + at + i] = fmaf(out[r * ROWS + i], w->row[at + i], w->bias[at + i]);
    }
}

#else /* ------------------------------------------------------------- rounding, and sharing out the tiles */

#define VARIANT_OF(name) Tile fewbit_tile_##name;
VARIANTS
#undef VARIANT_OF
#define VARIANT_OF(name) fewbit_tile_##name,
static Tile *const tiles[] = {VARIANTS};
#undef VARIANT_OF
#define VARIANT_OF(name) #name,
static const char *const names[] = {VARIANTS};

enum { KEPT = 256 << 10 }; /* bytes of x that are multiplied with all tiles before the next are: they stay in a cache */

/* One row of x to codes, a scale a span, and what the zeros of the weights come to. */
static void round_row(const Linear *w, const float *x, int8_t *code, float *scales, int32_t *corrections) {
    for (int64_t s = 0, at = 0; at < w->columns; s++, at += w->span) {
        const int64_t there = w->k - at, n = there < 0 ? 0 : there < w->span ? there : w->span;
        float scale = w->input_scale;
        if (scale == 0) {
            int32_t top = 0; /* magnitudes of floats are ordered like their bits; a NaN lies above all */
            for (int64_t i = 0; i < n; i++) {
                int32_t bits;
                memcpy(&bits, x + at + i, 4);
                bits &= INT32_MAX;
                top = bits > top ? bits : top;
            }
            memcpy(&scale, &top, 4);
            scale = top ? scale / 127.5f : 1;
            scale = scale < FLT_MIN ? FLT_MIN : scale;
        }
        int32_t sum = 0;
        for (int64_t i = 0; i < n; i++) {
            float v = x[at + i] / scale;
            v = v > -128 ? v : -128; /* a NaN too, whose scale then is one */
            v = v < 127 ? v : 127;
            const int32_t q = (int32_t)rintf(v);
            code[at + i] = (int8_t)q;
            sum += q;
        }
        memset(code + at + n, 0, (size_t)(w->span - n));
        scales[s] = scale;
        corrections[s] = -sum * (w->zeros ? 1 : w->zero);
    }
}

/* y[m][n] of x[m][k] with `threads` threads. 0; 1: no memory. */
int fewbit_linear(const Linear *w, const float *x, float *y, int64_t m, int threads, int variant) {
    const int64_t count = (w->n + ROWS - 1) / ROWS, spans = w->columns / w->span;
    const int64_t codes = (m * w->columns + 63) / 64 * 64;
    char *memory = aligned_alloc(64, (size_t)((codes + m * spans * 8 + 63) / 64 * 64));
    if (!memory) return 1;
    Input in = {(int8_t *)memory, (float *)(memory + codes), NULL};
    in.corrections = (int32_t *)(in.scales + m * spans);
    int64_t kept = KEPT / w->columns / 8 * 8;
    if (kept < 8) kept = 8;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i++) {
            const int64_t s = i * spans;
            round_row(w, x + i * w->k, in.codes + i * w->columns, in.scales + s, in.corrections + s);
        }
        for (int64_t first = 0; first < m; first += kept) {
            const int64_t end = first + kept < m ? first + kept : m;
#pragma omp for schedule(static) nowait
            for (int64_t tile = 0; tile < count; tile++) tiles[variant](w, tile, &in, first, end, y);
        }
    }
    free(memory);
    return 0;
}

/* The name of a variant; NULL: there are no more. */
const char *fewbit_variant(int index) { return index < (int)(sizeof names / sizeof *names) ? names[index] : NULL; }

/* Whether work is shared out over threads. */
int fewbit_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* Whether this processor has the instructions of a variant. */
int fewbit_runs(const char *name) {
#if defined(__x86_64__)
    if (!strcmp(name, "avx512vnni"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx512vl")) return fewbit_runs("avx512vnni");
    if (!strcmp(name, "avxvnni")) { /* leaf 7.1, bit 4 of eax: older compilers do not know the name */
        uint32_t a = 7, b, c = 1, d;
        if (!fewbit_runs("avx2")) return 0;
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        return a >> 4 & 1;
    }
#elif defined(__aarch64__) && defined(__linux__)
    if (!strcmp(name, "neon")) return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP: `sdot`, optional until 8.4 */
#elif defined(__aarch64__) /* macOS: all of Apple's have it */
    if (!strcmp(name, "neon")) return 1;
#endif
    return !strcmp(name, "plain");
}
#endif
