/* Kernels for CPUs: one file, which `build.py` compiles once for each instruction set, -DVARIANT=name, and once without
 * (what there is, and what this processor has), into one library. `name` of a variant is exported as name_variant. */
#ifdef VARIANT

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define EXPORT(type, name) type JOIN(name, VARIANT)

#include "vector.h"

#include "inputs.h"

#include "linear.h"

#include "attention.h"

#include "layer.h"

#else /* ------------------------------------------------------------- what there is, and what this processor has */

#include <stdint.h>
#include <string.h>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#define VARIANT_OF(name) #name,
static const char *const names[] = {VARIANTS};

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
#if defined(__x86_64__)
    if (!strcmp(name, "plain")) return __builtin_cpu_supports("sse4.1") != 0;
#endif
    return !strcmp(name, "plain");
}
#endif
