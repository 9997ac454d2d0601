/* A decoder layer: x to q, k, v; what attention sees (attention.h); and that to the next x.
 *
 *   h = norm(x); q, k, v = linears(h); q, k = rotate(norm(q), norm(k))
 *   x' = x + o(seen); h = norm(x'); x'' = x' + down(silu(gate(h)) up(h))
 *
 * RMSNorms in float32; sums of squares over 16 lanes, which are added in one order. */

enum { CHUNK = 128 }; /* rows that go through a layer together: what lies between the linears stays in a cache */
enum { Q, K, V, O, GATE, UP, DOWN, LINEARS };

typedef struct {
    const Linear *linears[LINEARS];
    const float *pre_attn, *pre_mlp, *q_norm, *k_norm; /* weights of the norms; NULL: q and k are not normalized */
    float attn_eps, mlp_eps, qk_eps;
    int32_t head_dim;
} Layer;

/* The RMSNorm of one row. */
static void normalize(const float *x, int64_t n, const float *weight, float eps, float *y) {
    VF sum[PARTS] = {0};
    float few[ROWS];
    for (int64_t i = 0; i < n; i += ROWS) {
        const float *from = x + i;
        if (n - i < ROWS) load_few(few, from, n - i), from = few;
        for (int p = 0; p < PARTS; p++) sum[p] = fma_(load(from + p * LANES), load(from + p * LANES), sum[p]);
    }
    const float scale = 1.0f / sqrtf(add_lanes(sum) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

/* Pairs of channels, half a head apart, turned by the angles of a row. */
static void rotate(float *x, const float *cosines, const float *sines, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

/* All threads of a team: rows for `count` linears that read the same, rounded once where they take the same. */
static void prepare_all(const Linear *const *w, int count, const float *x, int64_t m, char *memory, Input *in) {
    for (int i = 0; i < count; i++) {
        if (i && same_input(w[i - 1], w[i])) {
            in[i] = in[i - 1];
            continue;
        }
        in[i] = prepare(w[i], x, m, memory);
        memory += input_bytes(w[i], m);
    }
}

static int64_t all_bytes(const Linear *const *w, int count, int64_t m) {
    int64_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += input_bytes(w[i], m);
    return bytes;
}

INLINE int64_t at_most(int64_t rows) { return rows < CHUNK ? rows : CHUNK; }
INLINE int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

/* Memory of each half for m rows: normalized ones, of the second half what its MLP makes, and inputs of linears. */
static int64_t before_bytes(const Layer *layer, int64_t m) {
    return padded(at_most(m) * layer->linears[Q]->k * 4) + all_bytes(layer->linears + Q, 3, at_most(m));
}

static int64_t after_bytes(const Layer *layer, int64_t m) { /* of inputs more than any of the three needs */
    const Linear *const *w = layer->linears;
    return padded(at_most(m) * w[O]->n * 4) + padded(at_most(m) * w[GATE]->n * 4) + all_bytes(w + O, 4, at_most(m));
}

/* All threads of a team: q, k, v [m][heads x head_dim] of x[m][hidden]; cosines and sines [m][head_dim]. */
static void before(
    const Layer *layer, const float *x, const float *cosines, const float *sines, float *q, float *k, float *v,
    int64_t m, char *memory) {
    const Linear *const *w = layer->linears;
    const int64_t d = w[Q]->k, dim = layer->head_dim, heads = w[Q]->n / dim, all = heads + w[K]->n / dim;
    for (int64_t begin = 0; begin < m; begin += CHUNK) {
        const int64_t rows = at_most(m - begin);
        float *const h = (float *)memory, *const to[3] = {q + begin * w[Q]->n, k + begin * w[K]->n, v + begin * w[V]->n};
        Input in[3];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++)
            normalize(x + (begin + i) * d, d, layer->pre_attn, layer->attn_eps, h + i * d);
        prepare_all(w + Q, 3, h, rows, memory + padded(at_most(m) * d * 4), in);
        for (int i = 0; i < 3; i++) multiply(w[Q + i], in + i, NULL, NULL, rows, to[i], NULL);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * all; i++) {
            const int64_t row = i / all, head = i % all, angle = (begin + row) * dim;
            const int is_q = head < heads;
            float *one = is_q ? to[0] + row * w[Q]->n + head * dim : to[1] + row * w[K]->n + (head - heads) * dim;
            const float *norm = is_q ? layer->q_norm : layer->k_norm;
            if (norm) normalize(one, dim, norm, layer->qk_eps, one);
            rotate(one, cosines + angle, sines + angle, dim);
        }
    }
}

/* All threads of a team: y[m][hidden] of x[m][hidden], which y may be, and what attention saw[m][heads x head_dim]. */
static void after(const Layer *layer, const float *x, const float *seen, float *y, int64_t m, char *memory) {
    const Linear *const *w = layer->linears;
    const int64_t d = w[O]->n, width = w[GATE]->n;
    float *const h = (float *)memory, *const act = (float *)(memory + padded(at_most(m) * d * 4));
    char *const rest = (char *)act + padded(at_most(m) * width * 4);
    for (int64_t begin = 0; begin < m; begin += CHUNK) {
        const int64_t rows = at_most(m - begin);
        float *const out = y + begin * d;
        Input in[2];
        in[0] = prepare(w[O], seen + begin * w[O]->k, rows, rest);
        multiply(w[O], in, NULL, NULL, rows, out, x + begin * d);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) normalize(out + i * d, d, layer->pre_mlp, layer->mlp_eps, h + i * d);
        prepare_all(w + GATE, 2, h, rows, rest, in);
        multiply(w[GATE], in, w[UP], in + 1, rows, act, NULL);
#pragma omp barrier
        in[0] = prepare(w[DOWN], act, rows, rest);
        multiply(w[DOWN], in, NULL, NULL, rows, out, out);
#pragma omp barrier
    }
}

/* y[m][n]: the RMSNorms of rows. */
EXPORT(void, fewbit_normalize)(const float *x, int64_t m, int64_t n, const float *weight, float eps, float *y) {
    for (int64_t i = 0; i < m; i++) normalize(x + i * n, n, weight, eps, y + i * n);
}

/* `before` with `threads` threads. 0; 1: no memory. */
EXPORT(int, fewbit_before)
(const Layer *layer, const float *x, const float *cosines, const float *sines, float *q, float *k, float *v,
 int64_t m, int threads) {
    char *memory = aligned_alloc(64, (size_t)(before_bytes(layer, m) + 64));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    before(layer, x, cosines, sines, q, k, v, m, memory);
    free(memory);
    return 0;
}

/* `after` with `threads` threads. 0; 1: no memory. */
EXPORT(int, fewbit_after)
(const Layer *layer, const float *x, const float *seen, float *y, int64_t m, int threads) {
    char *memory = aligned_alloc(64, (size_t)(after_bytes(layer, m) + 64));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    after(layer, x, seen, y, m, memory);
    free(memory);
    return 0;
}

/* x[tokens][hidden] of a step through `count` layers, in place; of each its attention, cosines and sines. One team from
 * end to end: waking threads for every half would cost a small model more than its products. 0; 1: no memory. */
EXPORT(int, fewbit_layers)
(const Layer *const *layers, const Attention *const *attentions, const float *const *cosines, const float *const *sines,
 int64_t count, const Step *step, float *x, int threads) {
    const int64_t m = step->tokens;
    int64_t inside = 0, wide[3] = {0};
    for (int64_t i = 0; i < count; i++) {
        inside = greatest(inside, greatest(before_bytes(layers[i], m), after_bytes(layers[i], m)));
        for (int j = Q; j <= V; j++) wide[j] = greatest(wide[j], layers[i]->linears[j]->n);
    }
    char *memory = aligned_alloc(64, (size_t)(padded(inside) + padded(m * (2 * wide[Q] + wide[K] + wide[V]) * 4) + 64));
    if (!memory) return 1;
    float *const q = (float *)(memory + padded(inside)), *const seen = q + m * wide[Q], *const k = seen + m * wide[Q];
    float *const v = k + m * wide[K];
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        before(layers[i], x, cosines[i], sines[i], q, k, v, m, memory);
        attend(attentions[i], step, NULL, q, k, v, seen, threads);
#pragma omp barrier
        after(layers[i], x, seen, x, m, memory);
    }
    free(memory);
    return 0;
}
