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
 * Where inputs are NVFP4 or MXFP4, whose values are whole halves, codes are twice the value.
 *
 * BFLOAT16, FLOAT32 and FLOAT8 (E4M3) weights: y = fma(x, w, y) column after column; inputs as they are, or to E4M3 under
 * one scale a row or one for all, which multiplies y at the end.
 *
 * Every row of x is computed by itself: how many others there are, and how many threads, changes nothing.
 *
 * Weights lie in tiles of 16 rows, of each of which 4 columns lie together: 64 bytes are 16 rows x 4 columns, and an
 * instruction that adds four products to a 32-bit lane (`vpdpbusd`, `sdot`) meets them with 4 codes of x, broadcast.
 * Nothing is ever summed across a register, and the scales of the rows are a vector. 4-bit weights: the low halves of
 * 64 bytes are columns 0-3 of eight, the high halves columns 4-7. Floats: 16 rows of one column lie together. */

enum { KEPT = 256 << 10 }; /* bytes of x that are multiplied with all tiles before the next are: they stay in a cache */

/* One row of x is bound by reading weights, in one stream. A processor fetches ahead by itself, but not far enough while
 * numbers are made of what came: it is told of every line so many bytes before, to fetch it into its second cache.
 * Integers of 8 bits are used as they come, and go faster without. */
enum { AHEAD = 6 << 10 };
#define FETCH(p) __builtin_prefetch(p, 0, 2)

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
                    if (rows == 1 && p == 0 && kind != BITS8) FETCH(from + AHEAD);
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
    const int parts = tiles * PARTS, bytes = kind == BFLOAT16 ? 2 : kind == FLOAT8 ? 1 : 4;
    VF sum[BLOCK][TILES * PARTS] = {0};
    const float *x = in->floats + first * w->k;
    for (int64_t c = 0; c < w->k; c++, x += rows)
        for (int p = 0; p < parts; p++) {
            const int64_t at = ((tile + p / PARTS) * w->k + c) * ROWS + p % PARTS * LANES;
            if (rows == 1 && p == 0) FETCH((const char *)w->codes + at * bytes + AHEAD);
            const VF v = kind == BFLOAT16 ? load_bfloat16((const uint16_t *)w->codes + at)
                         : kind == FLOAT8 ? load_e4m3((const int8_t *)w->codes + at)
                                          : load((const float *)w->codes + at);
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
    case FLOAT8: floats(FLOAT8, rows, tiles, w, tile, in, first, out); break;     \
    default: floats(FLOAT32, rows, tiles, w, tile, in, first, out);               \
    }

static void one_row(const Linear *w, int64_t tile, const Input *in, int64_t first, float *out) {
    FETCH(w->row + tile * ROWS); /* what is wanted at the end, and lies in no stream */
    FETCH(w->bias + tile * ROWS);
    OF(1, 1)
}

/* A block of `rows` rows of x, from `first` on, with TILES tiles from `tile` on, or as many as there are: how many outputs
 * are made of each row, finished, in out[rows][WIDTH]. */
static int64_t tile_of(const Linear *w, int64_t tile, const Input *in, int64_t first, int64_t rows, float *out) {
    const int64_t left = tiles_of(w) - tile, tiles = left < TILES ? left : TILES;
    if (rows == 1) {
        for (int64_t i = 0; i < tiles; i++) one_row(w, tile + i, in, first, out + i * ROWS);
    } else if (tiles == TILES) {
        if (rows == BLOCK) OF(BLOCK, TILES)
        else OF(2, TILES)
    } else {
        if (rows == BLOCK) OF(BLOCK, 1)
        else OF(2, 1)
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < tiles * ROWS; i += LANES) {
            float *v = out + r * WIDTH + i;
            if (w->rounding == TO_E4M3) store(v, load(v) * in->scales[first + r]);
            store(v, fma_(load(v), load(w->row + tile * ROWS + i), load(w->bias + tile * ROWS + i)));
        }
    return w->n - tile * ROWS < WIDTH ? w->n - tile * ROWS : WIDTH;
}

/* Rows of x that are multiplied with all tiles before the next are. */
static int64_t kept_rows(const Linear *w) {
    const int64_t rows = KEPT / (is_float(w) ? 4 * w->k : w->columns) / BLOCK * BLOCK;
    return rows < BLOCK ? BLOCK : rows;
}

/* `n` numbers x to x / (1 + exp(-x)) times y, in whole registers. */
INLINE void silu_times(float *x, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        const VF v = load(x + i);
        store(x + i, v / (exp_(-v) + 1.0f) * load(y + i));
    }
}

/* All threads of a team, which do not wait for each other at the end: y[m][n] = `add`[m][n] (NULL: 0) + x w; of two
 * linears with as many outputs silu(x w) times x `up`, each with its input (NULL: of one). */
static void multiply(
    const Linear *w, const Input *in, const Linear *up, const Input *up_in, int64_t m, float *y, const float *add) {
    const int64_t kept = kept_rows(w), tiles = tiles_of(w);
    for (int64_t begin = 0; begin < m; begin += kept) {
        const int64_t end = begin + kept < m ? begin + kept : m;
#pragma omp for schedule(dynamic, 8) nowait
        for (int64_t tile = 0; tile < tiles; tile += TILES)
            for (int64_t i = begin, rows; i < end; i += rows) {
                float out[BLOCK * WIDTH], other[BLOCK * WIDTH];
                const int64_t made = tile_of(w, tile, in, i, rows = rows_of(end - i), out);
                if (up) tile_of(up, tile, up_in, i, rows, other);
                for (int64_t r = 0; r < rows; r++) {
                    float *to = y + (i + r) * w->n + tile * ROWS, *of = out + r * WIDTH;
                    const float *more = add ? add + (to - y) : NULL;
                    if (up) silu_times(of, other + r * WIDTH, made);
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
        multiply(w, &in, NULL, NULL, m, y, NULL);
    }
    free(memory);
    return 0;
}
