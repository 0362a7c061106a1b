/* Vectors of V floats, as wide as the processor's registers or twice that, by the extension that gcc
   and clang share. Loads and stores need no alignment. */
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
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec choose(ivec where, vec a, vec b) {
    return (vec)(((ivec)a & where) | ((ivec)b & ~where));
}

static inline float sum_of(vec v) {
    float total = 0;
    for (int i = 0; i < V; i++) total += v[i];
    return total;
}

#endif
