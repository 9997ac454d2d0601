/* Attention of one layer over K and V in pages. What a step brings is stored first, then every query reads what is stored.
 *
 * A query of position t sees the keys max(0, t - window + 1) .. t of its sequence, in blocks of KEYS from position 0 on:
 *
 *   scores    s = (q . k) scale: 16 sums over head_dim (fma; sum j takes the channels j, j + 16, ..), added in pairs
 *   softmax   top' = max(top, s of the block), p = exp(s - top'), total = total exp(top - top') + p, in 16 sums
 *   values    acc = acc exp(top - top') + p v, key after key (fma); at the end acc / total
 *
 * (online softmax: Milakov and Gimelshein, arXiv:1805.02867). Scales of K and V multiply the scores and the end. Nothing
 * depends on how many queries share what is read, on pages, threads or registers: the same bits everywhere. */

enum { KEYS = 64, QUERIES = 16, DIMS = 256 }; /* keys of a block; queries that share what is read; channels at most */
enum { WIDE = 4, DEEP = LANES == 16 ? 4 : 1, ABREAST = LANES == 16 ? 16 : 4 }; /* what the registers have room for */
enum { IN_FLOAT32, IN_FLOAT16, IN_BFLOAT16, IN_INT8, IN_E4M3 };                /* what K or V are stored in */

typedef struct {
    char *stored;       /* [slots][kv_heads][head_dim] */
    const float *scale; /* [kv_heads], of codes; NULL: 1 */
    int64_t kind;
} Cache;

typedef struct {
    Cache k, v;
    int64_t heads, kv_heads, head_dim, page, window; /* page: slots of one; window 0: none */
    float scale, softcap;                            /* softcap 0: none */
} Attention;

typedef struct { /* rows of one sequence */
    int64_t row, count, first, table; /* its first row, how many, the position of the first, where its table begins */
} Span;

typedef struct { /* the sequences of a step, one behind the other */
    const Span *spans;
    int64_t count, tokens;
    const int64_t *slots, *tables; /* [tokens], where K and V go; tables of pages */
} Step;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef float Block[DIMS / ROWS][KEYS][ROWS]; /* K or V of a head as numbers, filled up to whole sixteens with zeros */

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VI){__VA_ARGS__})
#endif

/* The sums of neighbours in a, then in b. */
INLINE VF add_pairs(VF a, VF b) {
#define EVEN(i, n) 2 * (i) + (n)
#define FOUR(i, n) EVEN(i, n), EVEN(i + 1, n), EVEN(i + 2, n), EVEN(i + 3, n)
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return SHUFFLE(a, b, FOUR(0, 0), FOUR(4, 0), FOUR(8, 0), FOUR(12, 0)) +
           SHUFFLE(a, b, FOUR(0, 1), FOUR(4, 1), FOUR(8, 1), FOUR(12, 1));
#elif defined(__AVX2__)
    return SHUFFLE(a, b, FOUR(0, 0), FOUR(4, 0)) + SHUFFLE(a, b, FOUR(0, 1), FOUR(4, 1));
#else
    return SHUFFLE(a, b, FOUR(0, 0)) + SHUFFLE(a, b, FOUR(0, 1));
#endif
}

INLINE int64_t stored_bytes(int64_t kind) { return kind == IN_FLOAT32 ? 4 : kind >= IN_INT8 ? 1 : 2; }

/* A small float, its sign taken off, whose exponent is `up` too small where it lies; from `special` on no number. */
INLINE VF widened(VI bits, VI sign, float up, int32_t special) {
    const VF v = (VF)bits * up;
    return (VF)((VI)pick(bits >= special, (VF)(bits | 0x7f800000), v) | sign);
}

INLINE VF load_stored(const int kind, const char *p) {
    if (kind == IN_FLOAT32) return load((const float *)p);
    if (kind == IN_BFLOAT16) return load_bfloat16((const uint16_t *)p);
    if (kind == IN_FLOAT16) {
        const VI code = widen2((const uint16_t *)p);
        return widened((code & 0x7fff) << 13, (code & 0x8000) << 16, 0x1p112f, 0x7c00 << 13);
    }
    const VI code = widen1((const uint8_t *)p);
    if (kind == IN_INT8) return __builtin_convertvector((code ^ 128) - 128, VF);
    return widened((code & 0x7f) << 20, code << 24 & INT32_MIN, 0x1p120f, 0x7f << 20);
}

/* x in float16 or E4M3: |x| below the smallest normal number is rounded by adding `magic`, which has the right last bit. */
INLINE int32_t narrowed(float x, int shift, uint32_t normal, float magic, int32_t less) {
    const float small = fabsf(x) + magic;
    uint32_t bits, base, sum;
    memcpy(&bits, &x, 4);
    memcpy(&base, &magic, 4);
    memcpy(&sum, &small, 4);
    bits &= INT32_MAX;
    if (bits < normal) return (int32_t)(sum - base);
    return (int32_t)((bits + (1u << (shift - 1)) - 1 + (bits >> shift & 1)) >> shift) - less;
}

/* `n` numbers as the codec stores them: to nearest, ties to even; codes saturate, a NaN stays one where there is one. */
INLINE void store_some(const int kind, const float *x, int64_t n, float scale, char *to) {
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        const int32_t sign = bits >> 31 & 1, nan = x[i] != x[i];
        if (kind == IN_FLOAT32) {
            memcpy(to + 4 * i, x + i, 4);
        } else if (kind == IN_BFLOAT16) {
            const uint32_t u = (uint32_t)bits;
            ((uint16_t *)to)[i] = (uint16_t)(nan ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
        } else if (kind == IN_FLOAT16) {
            const int32_t code = narrowed(x[i], 13, 0x38800000, 0.5f, 112 << 10);
            ((uint16_t *)to)[i] = (uint16_t)((nan ? 0x7e00 : code > 0x7c00 ? 0x7c00 : code) | sign << 15);
        } else if (kind == IN_INT8) {
            float v = rintf(x[i] / scale);
            v = v > -128 ? v : -128; /* a NaN too */
            to[i] = (char)(int8_t)(v < 127 ? v : 127);
        } else {
            float v = x[i] / scale;
            v = v > 448 ? 448 : v < -448 ? -448 : v;
            to[i] = (char)((nan ? 0x7f : narrowed(v, 20, 0x3c800000, 16384.0f, 120 << 3)) | sign << 7);
        }
    }
}

/* K or V of one head in its slot. */
static void store_head(const Cache *cache, const Attention *a, const float *x, int64_t slot, int64_t head) {
    char *to = cache->stored + (slot * a->kv_heads + head) * a->head_dim * stored_bytes(cache->kind);
    const float scale = cache->scale ? cache->scale[head] : 1;
    switch (cache->kind) {
    case IN_FLOAT32: store_some(IN_FLOAT32, x, a->head_dim, scale, to); break;
    case IN_FLOAT16: store_some(IN_FLOAT16, x, a->head_dim, scale, to); break;
    case IN_BFLOAT16: store_some(IN_BFLOAT16, x, a->head_dim, scale, to); break;
    case IN_INT8: store_some(IN_INT8, x, a->head_dim, scale, to); break;
    default: store_some(IN_E4M3, x, a->head_dim, scale, to);
    }
}

typedef struct { /* a sequence: its pages, and how many of its tokens are stored and wanted */
    const int64_t *table;
    int64_t tokens;
} Past;

/* Where K or V of a head and position lie. */
INLINE const char *slot_of(const Attention *a, const Cache *cache, const Past *past, int64_t head, int64_t t) {
    const int64_t slot = past->table[t / a->page] * a->page + t % a->page;
    return cache->stored + (slot * a->kv_heads + head) * a->head_dim * stored_bytes(cache->kind);
}

/* Keys begin .. end - 1 of a head, which lie in one block: `b` from row begin % KEYS on. Memory is asked for the next. */
INLINE void read_some(const int kind, const Attention *a, const Cache *cache, const Past *past, int64_t head, int64_t begin,
                      int64_t end, Block b) {
    const int64_t page = a->page, bytes = stored_bytes(kind), dim = a->head_dim;
    for (int64_t at = begin, run; at < end; at += run) {
        run = page - at % page < end - at ? page - at % page : end - at;
        const char *from = slot_of(a, cache, past, head, at);
        const int64_t later = at + KEYS < past->tokens ? slot_of(a, cache, past, head, at + KEYS) - from : 0;
        for (int64_t i = 0; i < run; i++, from += a->kv_heads * dim * bytes) {
            for (int64_t l = 0; l < dim * bytes; l += 64) __builtin_prefetch(from + later + l);
            float(*to)[KEYS][ROWS] = (float(*)[KEYS][ROWS])b[0][(at + i) % KEYS];
            int64_t c = 0;
            for (; c + ROWS <= dim; c += ROWS, to++)
                for (int p = 0; p < PARTS; p++)
                    store(to[0][0] + p * LANES, load_stored(kind, from + (c + p * LANES) * bytes));
            if (c == dim) continue;
            char few[4 * ROWS] = {0};
            memcpy(few, from + c * bytes, (size_t)((dim - c) * bytes));
            for (int p = 0; p < PARTS; p++) store(to[0][0] + p * LANES, load_stored(kind, few + p * LANES * bytes));
        }
    }
}

static void read_block(const Attention *a, const Cache *cache, const Past *past, int64_t head, int64_t begin,
                       int64_t end, Block b) {
    switch (cache->kind) {
    case IN_FLOAT32: read_some(IN_FLOAT32, a, cache, past, head, begin, end, b); break;
    case IN_FLOAT16: read_some(IN_FLOAT16, a, cache, past, head, begin, end, b); break;
    case IN_BFLOAT16: read_some(IN_BFLOAT16, a, cache, past, head, begin, end, b); break;
    case IN_INT8: read_some(IN_INT8, a, cache, past, head, begin, end, b); break;
    default: read_some(IN_E4M3, a, cache, past, head, begin, end, b);
    }
}

/* q . k of 16 keys from `at` on. */
INLINE void dots(const float *q, int64_t chunks, Block b, int64_t at, VF out[PARTS]) {
    VF sums[ROWS * PARTS];
    for (int64_t some = 0; some < ROWS; some += ABREAST) {
        VF sum[ABREAST][PARTS] = {0};
        const float *k = b[0][at + some];
        for (int64_t c = 0; c < chunks; c++, k += KEYS * ROWS)
            for (int p = 0; p < PARTS; p++) {
                const VF v = load(q + c * ROWS + p * LANES);
                for (int i = 0; i < ABREAST; i++) sum[i][p] = fma_(v, load(k + i * ROWS + p * LANES), sum[i][p]);
            }
        memcpy(sums + some * PARTS, sum, sizeof sum);
    }
    for (int n = ROWS * PARTS / 2; n >= PARTS; n /= 2)
        for (int i = 0; i < n; i++) sums[i] = add_pairs(sums[2 * i], sums[2 * i + 1]);
    memcpy(out, sums, PARTS * sizeof *out);
}

typedef struct { /* a query under way */
    float top, keep;
    int64_t at, position, begin, end; /* where it lies, and the rows of the block that it sees */
    VF total[PARTS];
} Query;

/* The scores of a query over a block to what its values are multiplied by. */
static void soften(const Attention *a, Query *q, const float *x, int64_t chunks, float factor, Block b, float p[KEYS]) {
    const VF zero = {0};
    const int64_t first = q->begin / ROWS, last = (q->end + ROWS - 1) / ROWS;
    VI lane[PARTS];
    VF most[PARTS];
    for (int i = 0; i < ROWS; i++) lane[i / LANES][i % LANES] = i;
    for (int part = 0; part < PARTS; part++) most[part] = zero + q->top;
    for (int64_t g = first; g < last; g++) {
        VF s[PARTS];
        dots(x, chunks, b, g * ROWS, s);
        for (int part = 0; part < PARTS; part++) {
            const VI at = lane[part] + (int32_t)(g * ROWS);
            VF v = s[part] * factor;
            if (a->softcap) /* tanh(y) = 1 - 2 / (exp(2 y) + 1) */
                v = a->softcap - 2 * a->softcap / (exp_(v * (2 / a->softcap)) + 1.0f);
            v = pick((at >= (int32_t)q->begin) & (at < (int32_t)q->end), v, zero - INFINITY);
            most[part] = pick(v > most[part], v, most[part]);
            store(p + g * ROWS + part * LANES, v);
        }
    }
    float tops[ROWS];
    memcpy(tops, most, sizeof tops);
    for (int n = ROWS / 2; n; n /= 2)
        for (int i = 0; i < n; i++) tops[i] = tops[i] > tops[i + n] ? tops[i] : tops[i + n];
    const float top = tops[0];
    q->keep = top == q->top ? 1 : exp_(zero + (q->top - top))[0];
    q->top = top;
    for (int part = 0; part < PARTS; part++) q->total[part] = q->total[part] * q->keep;
    for (int64_t g = first; g < last; g++)
        for (int part = 0; part < PARTS; part++) {
            const VI at = lane[part] + (int32_t)(g * ROWS);
            VF v = exp_(load(p + g * ROWS + part * LANES) - top);
            v = pick((at >= (int32_t)q->begin) & (at < (int32_t)q->end), v, zero);
            q->total[part] = q->total[part] + v;
            store(p + g * ROWS + part * LANES, v);
        }
}

/* Values of a block, 16 `chunks` channels of them, to what `queries` see that see the same of it. */
INLINE void add_values(const int queries, const int chunks, const Query *q, float (*p)[KEYS], float (*b)[KEYS][ROWS],
                       float (*acc)[DIMS]) {
    VF sum[WIDE][DEEP][PARTS];
    for (int i = 0; i < queries; i++)
        for (int c = 0; c < chunks; c++)
            for (int part = 0; part < PARTS; part++)
                sum[i][c][part] = load(acc[i] + c * ROWS + part * LANES) * q[i].keep;
    for (int64_t key = q->begin; key < q->end; key++)
        for (int c = 0; c < chunks; c++)
            for (int part = 0; part < PARTS; part++) {
                const VF v = load(b[c][key] + part * LANES);
                for (int i = 0; i < queries; i++) sum[i][c][part] = fma_(v, all(p[i][key]), sum[i][c][part]);
            }
    for (int i = 0; i < queries; i++)
        for (int c = 0; c < chunks; c++)
            for (int part = 0; part < PARTS; part++) store(acc[i] + c * ROWS + part * LANES, sum[i][c][part]);
}

/* How many queries from `q` on see the same of a block: WIDE, or one. */
INLINE int64_t alike(const Query *q, int64_t left) {
    if (left < WIDE) return 1;
    for (int i = 1; i < WIDE; i++)
        if (q[i].begin != q->begin || q[i].end != q->end) return 1;
    return WIDE;
}

/* What one thread does at a time: some rows of a span, and of some heads of K and V all heads of q, or a part of them. */
typedef struct {
    const Span *span;
    int64_t row, rows, kv, kvs, part, heads; /* heads of each of `kvs` heads of K and V, from `part` on */
} Task;

static void attend_some(const Attention *a, const Task *task, const int64_t *table, const float *sinks, const float *q,
                        float *out) {
    const int64_t dim = a->head_dim, chunks = (dim + ROWS - 1) / ROWS, group = a->heads / a->kv_heads;
    const int64_t first = task->span->first + task->row, end = first + task->rows, n = task->rows * task->heads;
    const int64_t oldest = a->window && first >= a->window ? first - a->window + 1 : 0;
    const Past past = {table, end};
    Query query[QUERIES];
    __attribute__((aligned(64))) float x[QUERIES][DIMS], acc[QUERIES][DIMS], p[QUERIES][KEYS];
    __attribute__((aligned(64))) Block b;
    for (int64_t i = 0; i < n * task->kvs; i++) {
        const int64_t h = (task->kv + i / n) * group + task->part + i % task->heads, r = i % n / task->heads;
        query[i] = (Query){.top = sinks ? sinks[h] : -FLT_MAX, .position = first + r};
        query[i].at = ((task->span->row + task->row + r) * a->heads + h) * dim;
        if (sinks) query[i].total[0][0] = 1;
        memset(x[i], 0, (size_t)chunks * ROWS * sizeof(float));
        memset(acc[i], 0, (size_t)chunks * ROWS * sizeof(float));
        memcpy(x[i], q + query[i].at, (size_t)dim * sizeof(float));
    }
    for (int64_t base = oldest / KEYS * KEYS; base < end; base += KEYS) {
        const int64_t begin = base < oldest ? oldest : base, stop = end - base < KEYS ? end : base + KEYS;
        for (int64_t i = 0; i < n * task->kvs; i++) {
            const int64_t t = query[i].position, far = a->window && t >= a->window ? t - a->window + 1 : 0;
            query[i].begin = far > base ? far - base : 0;
            query[i].end = least(t + 1 - base, KEYS);
        }
        for (int64_t head = 0; head < task->kvs; head++) { /* one after another: they lie beside each other */
            const int64_t kv = task->kv + head;
            for (int64_t c = 0; c < chunks; c++) { /* of what is not read nothing may come in */
                const int64_t from = (begin - base) % ROWS, to = (stop - base + ROWS - 1) / ROWS * ROWS;
                memset(b[c][begin - base - from], 0, (size_t)from * sizeof b[c][0]);
                memset(b[c][stop - base], 0, (size_t)(to - (stop - base)) * sizeof b[c][0]);
            }
            read_block(a, &a->k, &past, kv, begin, stop, b);
            for (int64_t i = head * n; i < (head + 1) * n; i++)
                if (query[i].begin < query[i].end)
                    soften(a, query + i, x[i], chunks, a->scale * (a->k.scale ? a->k.scale[kv] : 1), b, p[i]);
            read_block(a, &a->v, &past, kv, begin, stop, b);
            for (int64_t i = head * n, some; i < (head + 1) * n; i += some) {
                some = alike(query + i, (head + 1) * n - i);
                if (query[i].begin >= query[i].end) continue;
                int64_t c = 0;
#define VALUES(queries, deep) add_values(queries, deep, query + i, p + i, b + c, (float(*)[DIMS])(acc[i] + c * ROWS))
                for (; c + DEEP <= chunks; c += DEEP)
                    if (some == WIDE) VALUES(WIDE, DEEP);
                    else VALUES(1, DEEP);
                for (; c < chunks; c++)
                    if (some == WIDE) VALUES(WIDE, 1);
                    else VALUES(1, 1);
            }
        }
    }
    for (int64_t i = 0; i < n * task->kvs; i++) {
        const float last = (a->v.scale ? a->v.scale[task->kv + i / n] : 1) / add_lanes(query[i].total);
        for (int64_t d = 0; d < dim; d++) out[query[i].at + d] = acc[i][d] * last;
    }
}

/* All threads of a team, which do not wait for each other at the end: out[tokens][heads][head_dim] of q, k and v
 * [tokens][heads or kv_heads][head_dim]; sinks [heads] or NULL. */
static void attend(const Attention *a, const Step *step, const float *sinks, const float *q, const float *k, const float *v,
                   float *out, int threads) {
    const int64_t group = a->heads / a->kv_heads, parts = (group + QUERIES - 1) / QUERIES;
    const int64_t most = group < QUERIES ? QUERIES / group : 1;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < step->tokens * a->kv_heads; i++) {
        store_head(&a->k, a, k + i * a->head_dim, step->slots[i / a->kv_heads], i % a->kv_heads);
        store_head(&a->v, a, v + i * a->head_dim, step->slots[i / a->kv_heads], i % a->kv_heads);
    }
    for (const Span *span = step->spans; span < step->spans + step->count; span++) {
        const int64_t rows = least(most, span->count), blocks = (span->count + rows - 1) / rows;
        /* heads of K and V together, unless there are too few tasks then */
        const int64_t enough = (a->kv_heads * blocks + threads - 1) / threads;
        const int64_t kvs = least(least(group < QUERIES ? QUERIES / group / rows : 1, enough), a->kv_heads);
        const int64_t each = (a->kv_heads + kvs - 1) / kvs * parts;
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < blocks * each; i++) { /* the last rows see most: they come first */
            const int64_t row = (blocks - 1 - i / each) * rows, kv = i % each / parts * kvs, part = i % parts * QUERIES;
            const Task task = {
                span, row, least(rows, span->count - row), kv, least(kvs, a->kv_heads - kv),
                part, least(QUERIES, group - part)};
            attend_some(a, &task, step->tables + span->table, sinks, q, out);
        }
    }
}

/* `attend` with `threads` threads. */
EXPORT(void, fewbit_attend)
(const Attention *a, const Step *step, const float *sinks, const float *q, const float *k, const float *v, float *out,
 int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    attend(a, step, sinks, q, k, v, out, threads);
}
