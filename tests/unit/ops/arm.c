/* Runs kernels of ops/cpu on another machine, under an emulator: test_cpu_arm.py says what goes in and what comes out.
 *
 * Input: how many cases; each a word, then for `l` (a linear) its struct, its six arrays, m and x; for `h` (both halves
 * of a layer) the layer's struct, its linears, its four norms, m, x, cosines, sines and what attention saw. An array is
 * its size in bytes and its bytes; none is a size of 0. Output: y; q, k, v and y. */
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

static void *take(void) {
    const int64_t bytes = take_number();
    if (!bytes) return NULL;
    void *p = aligned_alloc(64, (size_t)padded(bytes));
    if (!p) exit(3);
    take_into(p, (size_t)bytes);
    return p;
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

int main(void) {
    for (int64_t left = take_number(); left; left--)
        if (take_number() == 'l') linear();
        else halves();
    return 0;
}
