/* Passes over whole planes of float32 cells: their ranges, and the gradient through the extrema. */
#include "planes.h"

#include <math.h>

#include "vectors.h"

/* The range of one plane, into out[0], out[stride], ... */
static void range_of(size_t cells, const float *x, const float *padding, float *out,
                     ptrdiff_t stride) {
    vec low = {0}, high = {0}, peak = {0};
    low += INFINITY, high -= INFINITY;
    float rest[V], rest_padding[V]; /* the last few cells, the very last one repeated */
    double mean = 0;
    float share = 1.0f / cells; /* before the sum, which then cannot overflow */
    vec means = filled(0);
    for (size_t j = 0; j < cells; j += V) {
        const float *cell = x + j, *pad = padding + j;
        if (j + V > cells) {
            for (size_t k = 0; k < V; k++) {
                size_t from = j + k < cells ? j + k : cells - 1;
                rest[k] = x[from], rest_padding[k] = padding[from];
            }
            cell = rest, pad = rest_padding;
        }
        vec v = load(cell), above = v + load(pad), below = v - load(pad);
        vec magnitude = choose(v < 0, -v, v);
        low = choose(above < low, above, low);
        high = choose(below > high, below, high);
        peak = choose(magnitude > peak, magnitude, peak);
        if (cell != rest) means += share * v;
    }
    float most[3] = {low[0], high[0], peak[0]};
    for (int k = 1; k < V; k++) {
        if (low[k] < most[0]) most[0] = low[k];
        if (high[k] > most[1]) most[1] = high[k];
        if (peak[k] > most[2]) most[2] = peak[k];
    }
    for (int i = 0; i < 3; i++) out[i * stride] = most[i];
    for (int k = 0; k < V; k++) mean += means[k];
    for (size_t j = cells / V * V; j < cells; j++) mean += share * x[j];
    out[3 * stride] = (float)mean;
}

void plane_ranges(int threads, int n, size_t cells, const float *x, const float *padding,
                  float *ranges, ptrdiff_t stride) {
#pragma omp parallel for num_threads(threads)
    for (int plane = 0; plane < n; plane++)
        range_of(cells, x + plane * cells, padding, ranges + plane, stride);
}

void spread_extrema(size_t cells, const float *x, const float *padding, float low, float high,
                    float to_low, float to_high, float *grad) {
    ivec at_low = {0}, at_high = {0};
    int lows = 0, highs = 0;
    size_t j = 0;
    for (; j + V <= cells; j += V) {
        vec pad = load(padding + j), v = load(x + j);
        at_low -= v + pad == low, at_high -= v - pad == high;
    }
    for (int k = 0; k < V; k++) lows += at_low[k], highs += at_high[k];
    for (; j < cells; j++) lows += x[j] + padding[j] == low, highs += x[j] - padding[j] == high;
    to_low /= lows ? lows : 1, to_high /= highs ? highs : 1;
    for (j = 0; j < cells; j++) {
        if (x[j] + padding[j] == low) grad[j] += to_low;
        if (x[j] - padding[j] == high) grad[j] += to_high;
    }
}
