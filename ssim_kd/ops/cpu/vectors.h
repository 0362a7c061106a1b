/* Vectors of V floats, as wide as the processor's registers or twice that, by an extension of gcc and
   clang. Loads and stores need no alignment. */
#ifndef SSIM_KD_VECTORS_H
#define SSIM_KD_VECTORS_H

#include <stdint.h>

#ifdef __AVX512F__
#define V 16
#else
#define V 8
#endif
typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * V), aligned(4), may_alias));

static inline vec filled(float value) { return (vec){0} + value; }
static inline vec load(const float *p) { return *(const vec *)p; }
static inline vec choose(ivec where, vec a, vec b) {
    return (vec)(((ivec)a & where) | ((ivec)b & ~where));
}

/* Adds v to ``sum`` and the rounding error to ``lost`` (Kahan): sum - lost is the result. */
static inline void add(vec *sum, vec *lost, vec v) {
    vec kept = v - *lost, next = *sum + kept;
    *lost = (next - *sum) - kept;
    *sum = next;
}

#endif
