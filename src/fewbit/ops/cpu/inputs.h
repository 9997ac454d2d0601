/* What a linear layer is, and rows of x as its product (linear.h) takes them. */

enum { QUAD = 64 };                                      /* bytes of 16 rows x 4 columns */
enum { BITS8, BITS4, E2M1, BFLOAT16, FLOAT32, FLOAT8 };  /* what a weight is */
enum { AS_IT_IS, TO_INT8, TO_E4M3, TO_NVFP4, TO_MXFP4 }; /* what inputs are rounded to */

typedef struct {
    const void *codes;     /* [tiles][columns / 8][QUAD * 2, of 4 bits QUAD]; floats [tiles][columns][ROWS] */
    const void *scales;    /* [tiles][groups][ROWS], float if scales_float, else bfloat16; NULL: 1 */
    const uint8_t *zeros;  /* [tiles][groups][ROWS]; NULL: `zero` everywhere */
    const float *row;      /* [tiles][ROWS] */
    const float *bias;     /* [tiles][ROWS] */
    const float *prescale; /* [k], what x is multiplied by first; NULL: nothing */
    int64_t n, k, columns; /* columns: k, filled up to whole spans */
    int64_t group, span;   /* columns to a scale of w, and to one of x; a span lies in one group and is 8 j wide */
    int32_t kind, zero, scales_float, rounding;
    float input_scale; /* of all of x; 0: made from each span. TO_NVFP4: of the scales, which are made */
} Linear;

/* Rows of x as the products take them: in blocks of so many as go through a tile at once (`block_of`), of which 4 columns
 * lie together: [block][columns / 4][rows of the block][4], floats [block][columns][rows]; what belongs to a span
 * [block][spans][rows]. */
typedef struct {
    const float *floats;
    int8_t *codes;
    float *scales;
    int32_t *corrections; /* minus the sum of the codes, times `zero` where that is one for all */
} Input;

INLINE int is_float(const Linear *w) { return w->kind >= BFLOAT16; }
INLINE int64_t tiles_of(const Linear *w) { return (w->n + ROWS - 1) / ROWS; }
INLINE int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Whether `b` takes the very input that `a` does. */
static int same_input(const Linear *a, const Linear *b) {
    const int32_t one = a->zeros ? 1 : a->zero, other = b->zeros ? 1 : b->zero;
    return is_float(a) == is_float(b) && a->prescale == b->prescale && a->rounding == b->rounding &&
           a->input_scale == b->input_scale && (is_float(a) || (a->span == b->span && one == other));
}

/* How many rows go through a tile at once, of `left`. */
INLINE int64_t rows_of(int64_t left) { return left >= BLOCK ? BLOCK : left >= 2 ? 2 : 1; }

/* The block of m rows that row `i` is in: its first row; `rows`: how many it has. */
INLINE int64_t block_of(int64_t i, int64_t m, int64_t *rows) {
    int64_t first = i / BLOCK * BLOCK;
    while (first + (*rows = rows_of(m - first)) <= i) first += *rows;
    return first;
}

/* Memory of `m` rows of input. */
static int64_t input_bytes(const Linear *w, int64_t m) {
    if (is_float(w)) return padded(m * w->k * 4) + padded(m * 4);
    return padded(m * w->columns) + padded(m * (w->columns / w->span) * 8);
}

/* The largest magnitude of `n` numbers, as bits: those of floats are ordered like them, and a NaN lies above all. */
INLINE int32_t top_of(const float *x, int64_t n, int32_t top) {
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= INT32_MAX;
        top = bits > top ? bits : top;
    }
    return top;
}

INLINE float float_of(int32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

/* The nearest number that E4M3 has, ties to even; a NaN stays one. */
INLINE float to_e4m3(float x) {
    x = x > 448 ? 448 : x < -448 ? -448 : x;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const float small = (fabsf(x) + 16384.0f) - 16384.0f; /* below 2^-6 steps of 2^-9, the last bit of 2^14 */
    const float large = float_of((int32_t)(((bits & INT32_MAX) + 0x7ffff + (bits >> 20 & 1)) & ~0xfffffu));
    return copysignf(fabsf(x) < 0x1p-6f ? small : x != x ? x : large, x);
}

/* The scale of numbers with this largest magnitude, as `numerics` chooses it. */
INLINE float scale_of(const Linear *w, int32_t top) {
    const float most = float_of(top);
    if (w->rounding == TO_NVFP4) {
        float scale = most / 6 / w->input_scale;
        scale = scale > 448 ? 448 : scale < 0x1p-9f ? 0x1p-9f : scale;
        return 0.5f * (top ? to_e4m3(scale) : 1) * w->input_scale;
    }
    if (w->rounding == TO_MXFP4) { /* the power of two at or below most / 4; from 7/4 of it on the next */
        if (most != most || most - most != 0) return most - most;
        int exponent;
        const float mantissa = frexpf(most, &exponent);
        exponent = top ? exponent - 3 + (mantissa >= 0.875f) : 0;
        return 0.5f * ldexpf(1, exponent < -127 ? -127 : exponent > 127 ? 127 : exponent);
    }
    const float scale = top ? most / (w->rounding == TO_E4M3 ? 448 : 127.5f) : 1;
    return scale < FLT_MIN ? FLT_MIN : scale;
}

/* Twice the nearest number that E2M1 has, of half of x; ties to the even code. */
INLINE float to_e2m1(float x) {
    const float a = 0.5f * fabsf(x);
    const int twice = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + 2 * (a > 2.5f) + 2 * (a >= 3.5f) + 4 * (a > 5);
    return copysignf((float)twice, x);
}

enum { STRIP = 32 }; /* numbers that are rounded at a time, at the most */

/* `n` numbers to codes, which go to every `stride`-th group of four: the sum of the codes. */
INLINE int32_t round_strip(const int e2m1, const float *x, int64_t n, float scale, int8_t *codes, int64_t stride) {
    int8_t strip[STRIP];
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        float v = x[i] / scale;
        if (e2m1) v = to_e2m1(v);
        v = v > -128 ? v : -128; /* a NaN too, of which the scale tells */
        v = v < 127 ? v : 127;
        const int32_t q = (int32_t)rintf(v);
        strip[i] = (int8_t)q;
        sum += q;
    }
    for (int64_t i = 0; i < n / 4; i++) memcpy(codes + i * stride, strip + 4 * i, 4);
    return sum;
}

/* `n` numbers x (times `prescale`), filled up to a strip. */
INLINE void copy_strip(const float *x, const float *prescale, int64_t n, float to[STRIP]) {
    memset(to, 0, STRIP * sizeof *to);
    for (int64_t i = 0; i < n; i++) to[i] = prescale ? x[i] * prescale[i] : x[i];
}

/* A span of `n` numbers that need no preparation; `n` is a constant where this is called. */
INLINE int32_t round_span(const Linear *w, const float *x, int64_t n, float *scale, int8_t *codes, int64_t stride) {
    if (*scale == 0) *scale = scale_of(w, top_of(x, n, 0));
    if (w->rounding == TO_INT8) return round_strip(0, x, n, *scale, codes, stride);
    return round_strip(1, x, n, *scale, codes, stride);
}

/* All threads of a team: `m` rows of x as `w` wants them, in `memory`. Ends with a barrier, unless nothing is done. */
static Input prepare(const Linear *w, const float *x, int64_t m, char *memory) {
    Input in = {x, NULL, NULL, NULL};
    if (is_float(w)) {
        const int64_t k = w->k;
        if (m == 1 && !w->prescale && !w->rounding) return in;
        float *floats = (float *)memory;
        in.floats = floats;
        if (w->rounding) in.scales = (float *)(memory + padded(m * k * 4));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i++) {
            int64_t rows, first = block_of(i, m, &rows);
            float *to = floats + first * k + i - first;
            for (int64_t c = 0; c < k; c++) to[c * rows] = x[i * k + c] * (w->prescale ? w->prescale[c] : 1);
            if (!w->rounding) continue;
            int32_t top = 0;
            for (int64_t c = 0; c < k && w->input_scale == 0; c++) top = top_of(to + c * rows, 1, top);
            const float scale = w->input_scale == 0 ? scale_of(w, top) : w->input_scale;
            for (int64_t c = 0; c < k; c++) to[c * rows] = to_e4m3(to[c * rows] / scale);
            in.scales[i] = scale;
        }
        return in;
    }
    const int64_t spans = w->columns / w->span;
    const int32_t zero = w->zeros ? 1 : w->zero;
    in.codes = (int8_t *)memory;
    in.scales = (float *)(memory + padded(m * w->columns));
    in.corrections = (int32_t *)(in.scales + m * spans);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * spans; i++) {
        const int64_t row = i / spans, s = i % spans, at = s * w->span;
        int64_t rows, first = block_of(row, m, &rows);
        const int64_t left = w->k - at, n = left < 0 ? 0 : left < w->span ? left : w->span;
        const float *from = x + row * w->k + at, *prescale = w->prescale ? w->prescale + at : NULL;
        int8_t *codes = in.codes + first * w->columns + at * rows + (row - first) * 4;
        int32_t sum = 0;
        float scale = w->rounding == TO_NVFP4 ? 0 : w->input_scale;
        if (n == 32 && w->span == 32 && !prescale) sum = round_span(w, from, 32, &scale, codes, rows * 4);
        else if (n == 16 && w->span == 16 && !prescale) sum = round_span(w, from, 16, &scale, codes, rows * 4);
        else {
            float strip[STRIP];
            int32_t top = 0;
            for (int64_t c = 0; c < n; c += STRIP) {
                copy_strip(from + c, prescale ? prescale + c : NULL, n - c < STRIP ? n - c : STRIP, strip);
                top = top_of(strip, STRIP, top);
            }
            if (scale == 0) scale = scale_of(w, top);
            if (top > 0x7f800000) scale = NAN; /* also where it is given: codes have no NaN */
            for (int64_t c = 0; c < w->span; c += STRIP) {
                const int64_t there = n - c < 0 ? 0 : n - c < STRIP ? n - c : STRIP;
                copy_strip(from + c, prescale ? prescale + c : NULL, there, strip);
                const int64_t wide = w->span - c < STRIP ? w->span - c : STRIP;
                sum += w->rounding == TO_INT8 ? round_strip(0, strip, wide, scale, codes + c * rows, rows * 4)
                                              : round_strip(1, strip, wide, scale, codes + c * rows, rows * 4);
            }
        }
        in.scales[first * spans + s * rows + row - first] = scale;
        in.corrections[first * spans + s * rows + row - first] = -sum * zero;
    }
    return in;
}
