/* The two halves of a decoder layer around its attention: x to q, k, v; and what was seen to the next x.
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

/* q, k, v [m][heads x head_dim] of x[m][hidden]; cosines and sines [m][head_dim]. 0; 1: no memory. */
EXPORT(int, fewbit_before)
(const Layer *layer, const float *x, const float *cosines, const float *sines, float *q, float *k, float *v,
 int64_t m, int threads) {
    const Linear *const *w = layer->linears;
    const int64_t d = w[Q]->k, dim = layer->head_dim, most = at_most(m), normal = padded(most * d * 4);
    char *memory = aligned_alloc(64, (size_t)(normal + all_bytes(w + Q, 3, most) + 64));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < m; begin += CHUNK) {
        const int64_t rows = at_most(m - begin);
        float *const h = (float *)memory, *const to[3] = {q + begin * w[Q]->n, k + begin * w[K]->n, v + begin * w[V]->n};
        Input in[3];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++)
            normalize(x + (begin + i) * d, d, layer->pre_attn, layer->attn_eps, h + i * d);
        prepare_all(w + Q, 3, h, rows, memory + normal, in);
        for (int i = 0; i < 3; i++) multiply(w[Q + i], in + i, NULL, NULL, rows, to[i], NULL);
#pragma omp barrier
        const int64_t heads = w[Q]->n / dim, all = heads + w[K]->n / dim;
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
    free(memory);
    return 0;
}

/* y[m][hidden] of x[m][hidden] and what attention saw[m][heads x head_dim]. 0; 1: no memory. */
EXPORT(int, fewbit_after)
(const Layer *layer, const float *x, const float *seen, float *y, int64_t m, int threads) {
    const Linear *const *w = layer->linears;
    const int64_t d = w[O]->n, width = w[GATE]->n, most = at_most(m);
    const int64_t normal = padded(most * d * 4), act_bytes = padded(most * width * 4);
    const int64_t inputs = all_bytes(w + O, 4, most); /* more than any of the three needs */
    char *memory = aligned_alloc(64, (size_t)(normal + act_bytes + inputs + 64));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < m; begin += CHUNK) {
        const int64_t rows = at_most(m - begin);
        float *const h = (float *)memory, *const act = (float *)(memory + normal), *const out = y + begin * d;
        char *const rest = memory + normal + act_bytes;
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
    free(memory);
    return 0;
}
