/* Runs kernels of ops/cpu on another machine, under an emulator: test_cpu_arm.py says what goes in and what comes out.
 *
 * Input: how many cases; each a word, then
 *
 *   l, a linear             its struct, its six arrays, m, x                                          to y
 *   h, halves of a layer    its struct, its linears, its four norms, m, x, cosines, sines, seen       to q, k, v, y
 *   a, attention            its struct, K and V and the scales of either, spans, slots, tables,
 *                           sinks, q, k, v                                                            to K, V, out
 *
 * An array is its size in bytes and its bytes; none is a size of 0. */
#include "cpu.c"
#include <stdio.h>

static void take_into(void *p, size_t bytes) {
    if (fread(p, 1, bytes, stdin) != bytes) exit(2);
}

static int64_t take_number(void) {
    int64_t n;
    take_into(&n, sizeof n);
    return n;
}

static void *take_sized(int64_t *bytes) {
    *bytes = take_number();
    if (!*bytes) return NULL;
    void *p = aligned_alloc(64, (size_t)padded(*bytes));
    if (!p) exit(3);
    take_into(p, (size_t)*bytes);
    return p;
}

static void *take(void) {
    int64_t bytes;
    return take_sized(&bytes);
}

static Linear *take_linear(void) {
    Linear *w = malloc(sizeof *w);
    if (!w) exit(3);
    take_into(w, sizeof *w);
    w->codes = take(), w->scales = take(), w->zeros = take(), w->row = take(), w->bias = take(), w->prescale = take();
    return w;
}

static float *made(int64_t numbers) {
    float *p = aligned_alloc(64, (size_t)padded(numbers * 4));
    if (!p) exit(3);
    return p;
}

static void give(const float *p, int64_t numbers) { fwrite(p, 4, (size_t)numbers, stdout); }

static void linear(void) {
    const Linear *w = take_linear();
    const int64_t m = take_number();
    float *y = made(m * w->n);
    if (JOIN(fewbit_linear, VARIANT)(w, take(), y, m, 1)) exit(3);
    give(y, m * w->n);
}

static void halves(void) {
    Layer layer;
    take_into(&layer, sizeof layer);
    for (int i = 0; i < LINEARS; i++) layer.linears[i] = take_linear();
    layer.pre_attn = take(), layer.pre_mlp = take(), layer.q_norm = take(), layer.k_norm = take();
    const int64_t m = take_number();
    const float *x = take(), *cosines = take(), *sines = take(), *seen = take();
    float *to[3], *y = made(m * layer.linears[O]->n);
    for (int i = 0; i < 3; i++) to[i] = made(m * layer.linears[i]->n);
    if (JOIN(fewbit_before, VARIANT)(&layer, x, cosines, sines, to[0], to[1], to[2], m, 1)) exit(3);
    if (JOIN(fewbit_after, VARIANT)(&layer, x, seen, y, m, 1)) exit(3);
    for (int i = 0; i < 3; i++) give(to[i], m * layer.linears[i]->n);
    give(y, m * layer.linears[O]->n);
}

static void attention(void) {
    Attention a;
    int64_t k_bytes, v_bytes, spans_bytes, q_bytes;
    take_into(&a, sizeof a);
    a.k.stored = take_sized(&k_bytes), a.v.stored = take_sized(&v_bytes);
    a.k.scale = take(), a.v.scale = take();
    const Span *spans = take_sized(&spans_bytes);
    const int64_t *slots = take(), *tables = take();
    const float *sinks = take(), *q = take_sized(&q_bytes), *k = take(), *v = take();
    float *out = made(q_bytes / 4);
    const int64_t count = spans_bytes / (int64_t)sizeof *spans;
    const Step step = {spans, count, spans[count - 1].row + spans[count - 1].count, slots, tables};
    JOIN(fewbit_attend, VARIANT)(&a, &step, sinks, q, k, v, out, 1);
    fwrite(a.k.stored, 1, (size_t)k_bytes, stdout);
    fwrite(a.v.stored, 1, (size_t)v_bytes, stdout);
    give(out, q_bytes / 4);
}

int main(void) {
    for (int64_t left = take_number(); left; left--) {
        const int64_t what = take_number();
        if (what == 'l') linear();
        else if (what == 'h') halves();
        else attention();
    }
    return 0;
}
