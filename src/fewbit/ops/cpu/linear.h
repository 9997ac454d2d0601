/* Linear layers: y[m][n] = sum_k x[m][k] w[n][k] + bias[n].
 *
 * Weights of few bits (BITS8, BITS4, E2M1), on every machine to the same last bit:
 *
 *   inputs    a row of x is cut into spans of columns; each has a float scale a = amax / 127.5 (or one that is given)
 *             and codes q = clamp(round_half_even(x / a), -128, 127)
 *   products  integers within a span: d = sum (u - z) q in 32 bits, u >= 0 the stored weight, z its zero
 *   sums      p = fma(d, a, p), span after span of a group of the weight; y = fma(p, s, y), group after group, s its
 *             scale; at the end y r + bias, r the scale of the row
 *
 * BFLOAT16 and FLOAT32 weights: inputs as they are, y = fma(x, w, y) column after column.
 *
 * Every row of x is computed by itself: how many others there are, and how many threads, changes nothing.
 *
 * Weights lie in tiles of 16 rows, of each of which 4 columns lie together: 64 bytes are 16 rows x 4 columns, and an
 * instruction that adds four products to a 32-bit lane (`vpdpbusd`, `sdot`) meets them with 4 codes of x, broadcast.
 * Nothing is ever summed across a register, and the scales of the rows are a vector. 4-bit weights: the low halves of
 * 64 bytes are columns 0-3 of eight, the high halves columns 4-7. Floats: 16 rows of one column lie together. */

enum { QUAD = 64 };                           /* bytes of 16 rows x 4 columns */
enum { BITS8, BITS4, E2M1, BFLOAT16, FLOAT32 }; /* what a weight is */
enum { KEPT = 256 << 10 }; /* bytes of x that are multiplied with all tiles before the next are: they stay in a cache */

typedef struct {
    const void *codes;     /* [tiles][columns / 8][QUAD * 2, of 4 bits QUAD]; floats [tiles][columns][ROWS] */
    const void *scales;    /* [tiles][groups][ROWS], float if scales_float, else bfloat16; NULL: 1 */
    const uint8_t *zeros;  /* [tiles][groups][ROWS]; NULL: `zero` everywhere */
    const float *row;      /* [tiles][ROWS] */
    const float *bias;     /* [tiles][ROWS] */
    const float *prescale; /* [k], what x is multiplied by first; NULL: nothing */
    int64_t n, k, columns; /* columns: k, filled up to whole spans */
    int64_t group, span;   /* columns to a scale of w, and to one of x; a span lies in one group and is 8 j wide */
    int32_t kind, zero, scales_float;
    float input_scale; /* of all of x; 0: made from each span */
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
    return is_float(a) == is_float(b) && a->prescale == b->prescale &&
           (is_float(a) || (a->span == b->span && a->input_scale == b->input_scale && one == other));
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
    if (is_float(w)) return padded(m * w->k * 4);
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

INLINE float scale_of(int32_t top) {
    float scale;
    memcpy(&scale, &top, 4);
    scale = top ? scale / 127.5f : 1;
    return scale < FLT_MIN ? FLT_MIN : scale;
}

enum { STRIP = 32 }; /* numbers that are rounded at a time, at the most */

/* `n` numbers to codes, which go to every `stride`-th group of four: the sum of the codes. */
INLINE int32_t round_strip(const float *x, int64_t n, float scale, int8_t *codes, int64_t stride) {
    int8_t strip[STRIP];
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        float v = x[i] / scale;
        v = v > -128 ? v : -128; /* a NaN too, whose scale then is one */
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
INLINE int32_t round_span(const float *x, int64_t n, float *scale, int8_t *codes, int64_t stride) {
    if (*scale == 0) *scale = scale_of(top_of(x, n, 0));
    return round_strip(x, n, *scale, codes, stride);
}

/* All threads of a team: `m` rows of x as `w` wants them, in `memory`. Ends with a barrier, unless nothing is done. */
static Input prepare(const Linear *w, const float *x, int64_t m, char *memory) {
    Input in = {x, NULL, NULL, NULL};
    if (is_float(w)) {
        if (m == 1 && !w->prescale) return in;
        float *floats = (float *)memory;
        in.floats = floats;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i++) {
            int64_t rows, first = block_of(i, m, &rows);
            for (int64_t c = 0; c < w->k; c++)
                floats[first * w->k + c * rows + i - first] = x[i * w->k + c] * (w->prescale ? w->prescale[c] : 1);
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
        float scale = w->input_scale;
        if (n == 32 && w->span == 32 && !prescale) sum = round_span(from, 32, &scale, codes, rows * 4);
        else if (n == 16 && w->span == 16 && !prescale) sum = round_span(from, 16, &scale, codes, rows * 4);
        else {
            float strip[STRIP];
            int32_t top = 0;
            for (int64_t c = 0; c < n && scale == 0; c += STRIP) {
                copy_strip(from + c, prescale ? prescale + c : NULL, n - c < STRIP ? n - c : STRIP, strip);
                top = top_of(strip, STRIP, top);
            }
            if (scale == 0) scale = scale_of(top);
            for (int64_t c = 0; c < w->span; c += STRIP) {
                const int64_t there = n - c < 0 ? 0 : n - c < STRIP ? n - c : STRIP;
                copy_strip(from + c, prescale ? prescale + c : NULL, there, strip);
                sum += round_strip(strip, w->span - c < STRIP ? w->span - c : STRIP, scale, codes + c * rows, rows * 4);
            }
        }
        in.scales[first * spans + s * rows + row - first] = scale;
        in.corrections[first * spans + s * rows + row - first] = -sum * zero;
    }
    return in;
}

static const uint8_t e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; /* twice the value, + 12 */

enum { WIDTH = TILES * ROWS }; /* outputs of a block of tiles: [rows][WIDTH] */

/* A block of `rows` rows of x, from `first` on, with `tiles` tiles from `tile` on. `kind`, `rows`, `tiles` and `known` are
 * constants where this is called; a `known` span of 0 is any. Register p is part p % PARTS of tile p / PARTS. */
INLINE void integers(
    const int kind, const int rows, const int tiles, const int64_t known, const Linear *w, int64_t tile, const Input *in,
    int64_t first, float *out) {
    const int parts = tiles * PARTS;
    const int64_t span = known ? known : w->span, spans = w->columns / span;
    const int64_t groups = (w->columns + w->group - 1) / w->group;
    const int64_t step = kind == BITS8 ? 2 * QUAD : QUAD, tile_bytes = w->columns / 8 * step; /* step: 8 columns */
    const uint8_t *code = (const uint8_t *)w->codes + tile * tile_bytes;
    const int8_t *x = in->codes + first * w->columns;
    const float *scales = in->scales + first * spans;
    const int32_t *corrections = in->corrections + first * spans;
    VF sum[BLOCK][TILES * PARTS] = {0};
    for (int64_t group = 0, s = 0; group < groups; group++) {
        int64_t of[TILES * PARTS]; /* where the scales of a register are */
        for (int p = 0; p < parts; p++) of[p] = ((tile + p / PARTS) * groups + group) * ROWS + p % PARTS * LANES;
        const int64_t end = (group + 1) * w->group / span < spans ? (group + 1) * w->group / span : spans;
        VF part[BLOCK][TILES * PARTS] = {0};
        for (; s < end; s++, scales += rows, corrections += rows) {
            VI dot[BLOCK][TILES * PARTS];
            for (int p = 0; p < parts; p++) {
                const VI zeros = w->zeros ? widen1(w->zeros + of[p]) : (VI){0} + 1;
                for (int r = 0; r < rows; r++) dot[r][p] = zeros * corrections[r];
            }
            for (int64_t c = 0; c < span; c += 8, code += step, x += 8 * rows)
                for (int p = 0; p < parts; p++) {
                    const uint8_t *from = code + p / PARTS * tile_bytes + p % PARTS * sizeof(VB);
                    VB lo, hi;
                    memcpy(&lo, from, sizeof lo);
                    if (kind == BITS8) {
                        memcpy(&hi, from + QUAD, sizeof hi);
                    } else {
                        hi = lo >> 4;
                        lo &= 15;
                    }
                    if (kind == E2M1) lo = look_up(e2m1, lo), hi = look_up(e2m1, hi);
                    for (int r = 0; r < rows; r++)
                        dot[r][p] = dot8(dot[r][p], lo, hi, x + r * 4, x + (rows + r) * 4, kind != BITS8);
                }
            for (int p = 0; p < parts; p++)
                for (int r = 0; r < rows; r++)
                    part[r][p] = fma_(__builtin_convertvector(dot[r][p], VF), all(scales[r]), part[r][p]);
        }
        for (int p = 0; p < parts; p++) {
            VF scale = all(1.0f);
            if (w->scales && w->scales_float) scale = load((const float *)w->scales + of[p]);
            if (w->scales && !w->scales_float) scale = load_bfloat16((const uint16_t *)w->scales + of[p]);
            for (int r = 0; r < rows; r++) sum[r][p] = fma_(part[r][p], scale, sum[r][p]);
        }
    }
    for (int r = 0; r < rows; r++) memcpy(out + r * WIDTH, sum[r], (size_t)parts * sizeof sum[r][0]);
}

INLINE void floats(
    const int kind, const int rows, const int tiles, const Linear *w, int64_t tile, const Input *in, int64_t first,
    float *out) {
    const int parts = tiles * PARTS;
    VF sum[BLOCK][TILES * PARTS] = {0};
    const float *x = in->floats + first * w->k;
    for (int64_t c = 0; c < w->k; c++, x += rows)
        for (int p = 0; p < parts; p++) {
            const int64_t at = ((tile + p / PARTS) * w->k + c) * ROWS + p % PARTS * LANES;
            const VF v = kind == BFLOAT16 ? load_bfloat16((const uint16_t *)w->codes + at) : load((const float *)w->codes + at);
            for (int r = 0; r < rows; r++) sum[r][p] = fma_(v, all(x[r]), sum[r][p]);
        }
    for (int r = 0; r < rows; r++) memcpy(out + r * WIDTH, sum[r], (size_t)parts * sizeof sum[r][0]);
}

#define INTEGERS(kind, rows, tiles)                                                                      \
    if (w->span == 32) integers(kind, rows, tiles, 32, w, tile, in, first, out);                         \
    else if (w->span == 16 && kind == E2M1) integers(kind, rows, tiles, 16, w, tile, in, first, out);    \
    else integers(kind, rows, tiles, 0, w, tile, in, first, out)
#define OF(rows, tiles)                                                           \
    switch (w->kind) {                                                            \
    case BITS8: INTEGERS(BITS8, rows, tiles); break;                              \
    case BITS4: INTEGERS(BITS4, rows, tiles); break;                              \
    case E2M1: INTEGERS(E2M1, rows, tiles); break;                                \
    case BFLOAT16: floats(BFLOAT16, rows, tiles, w, tile, in, first, out); break; \
    default: floats(FLOAT32, rows, tiles, w, tile, in, first, out);               \
    }

/* A block of `rows` rows of x, from `first` on, with TILES tiles from `tile` on, or as many as there are: how many outputs
 * are made of each row, finished, in out[rows][WIDTH]. */
static int64_t tile_of(const Linear *w, int64_t tile, const Input *in, int64_t first, int64_t rows, float *out) {
    const int64_t left = tiles_of(w) - tile, tiles = left < TILES ? left : TILES;
    if (tiles == TILES) {
        if (rows == BLOCK) OF(BLOCK, TILES)
        else if (rows == 2) OF(2, TILES)
        else OF(1, TILES)
    } else {
        if (rows == BLOCK) OF(BLOCK, 1)
        else if (rows == 2) OF(2, 1)
        else OF(1, 1)
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < tiles * ROWS; i += LANES) {
            float *v = out + r * WIDTH + i;
            store(v, fma_(load(v), load(w->row + tile * ROWS + i), load(w->bias + tile * ROWS + i)));
        }
    return w->n - tile * ROWS < WIDTH ? w->n - tile * ROWS : WIDTH;
}

/* Rows of x that are multiplied with all tiles before the next are. */
static int64_t kept_rows(const Linear *w) {
    const int64_t rows = KEPT / (is_float(w) ? 4 * w->k : w->columns) / BLOCK * BLOCK;
    return rows < BLOCK ? BLOCK : rows;
}

/* All threads of a team, which do not wait for each other at the end: y[m][n] = `add`[m][n] (NULL: 0) + x w. */
static void multiply(const Linear *w, const Input *in, int64_t m, float *y, const float *add) {
    const int64_t kept = kept_rows(w), tiles = tiles_of(w);
    for (int64_t begin = 0; begin < m; begin += kept) {
        const int64_t end = begin + kept < m ? begin + kept : m;
#pragma omp for schedule(static) nowait
        for (int64_t tile = 0; tile < tiles; tile += TILES)
            for (int64_t i = begin, rows; i < end; i += rows) {
                float out[BLOCK * WIDTH];
                const int64_t made = tile_of(w, tile, in, i, rows = rows_of(end - i), out);
                for (int64_t r = 0; r < rows; r++) {
                    float *to = y + (i + r) * w->n + tile * ROWS;
                    const float *of = out + r * WIDTH, *more = add ? add + (to - y) : NULL;
                    for (int64_t j = 0; j < made; j++) to[j] = more ? more[j] + of[j] : of[j];
                }
            }
    }
}

/* y[m][n] of x[m][k] with `threads` threads. 0; 1: no memory. */
EXPORT(int, fewbit_linear)(const Linear *w, const float *x, float *y, int64_t m, int threads) {
    char *memory = aligned_alloc(64, (size_t)(input_bytes(w, m) + 64));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Input in = prepare(w, x, m, memory);
        multiply(w, &in, m, y, NULL);
    }
    free(memory);
    return 0;
}
