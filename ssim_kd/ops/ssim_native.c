/*
SSIM and its gradient for planes of H x W float32 cells, compiled by ssim_native.py on first use.

The notation and the algebra are those of ssim_pointwise.py. A plane is taken row by row, and all
that lies between reading a row and writing its gradient stays in the innermost caches: a ring of
the last K rows filtered along the row, for each of the four moments, and one for each of the three
gradients on their way back. When row i comes in, the moments of row i - R are complete, and with
them the gradient of row i - 2 R.

K, the window's size, is defined on the command line, so that the filters unroll. Buffers are padded
to whole vectors; what lies beyond a row is arbitrary and is never read into a cell.
*/
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define R (K / 2)
#ifdef __AVX512F__
#define V 16
#else
#define V 8
#endif
typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * V), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec choose(ivec where, vec a, vec b) {
    return (vec)(((ivec)a & where) | ((ivec)b & ~where));
}

static float sum_of(vec v) {
    float total = 0;
    for (int i = 0; i < V; i++) total += v[i];
    return total;
}

/* The cell that position i of an axis of n cells folds back to: see window.reflected_index. */
static int reflected(int i, int n) {
    if (i >= 0 && i < n) return i; /* as a rule, and divisions are slow */
    if (n == 1) return 0;
    int period = 2 * (n - 1);
    i = (i % period + period) % period;
    return i < n ? i : period - i;
}

/* out[j] = sum_k weight[k] * (tap k of cell j), for j < n and up to 2 V - 1 cells beyond. Tap k
   lies at in + at[k] + j. Two vectors at a time, since one alone waits for its own last sum. */
static inline void filter(const float *in, const ptrdiff_t *at, const float *weight, int n,
                          float *out) {
    for (int j = 0; j < n; j += 2 * V) {
        vec even = {0}, odd = {0};
        for (int k = 0; k < K; k++) {
            even += weight[k] * load(in + at[k] + j);
            odd += weight[k] * load(in + at[k] + j + V);
        }
        store(out + j, even);
        store(out + j + V, odd);
    }
}

/* Constants of a plane. A value is x' = (cell / 2 - half_mean) * scale, x = x' + shift. */
typedef struct {
    float half_mean_x, scale_x, shift_x, half_mean_y, scale_y, shift_y, c1, c2, eps;
} Plane;

typedef struct {
    int h, w;
    size_t row;                    /* floats of a padded row */
    float *x, *y;                  /* rings of 2 K rows: x', y' */
    float *moment[4], *back[3];    /* rings of K rows */
    float *wide[4];                /* a row with 2 R more cells on either side */
    float *line[4], *weight;       /* a row */
    ptrdiff_t along[K];            /* taps along a row */
    int left[R + 1], right[R + 1]; /* the cells seen k cells beyond either end of a row */
    float *memory;
} Work;

static int begin(Work *s, int h, int w) {
    s->h = h, s->w = w;
    s->row = ((size_t)w + 4 * R + 4 * V - 1) / (2 * V) * (2 * V);
    float *p = s->memory = calloc((11 * K + 9) * s->row, sizeof(float));
    if (!p) return 0;
    s->x = p, p += 2 * K * s->row;
    s->y = p, p += 2 * K * s->row;
    for (int i = 0; i < 4; i++) s->moment[i] = p, p += K * s->row;
    for (int i = 0; i < 3; i++) s->back[i] = p, p += K * s->row;
    for (int i = 0; i < 4; i++) s->wide[i] = p, p += s->row;
    for (int i = 0; i < 4; i++) s->line[i] = p, p += s->row;
    s->weight = p;
    for (int k = 0; k < K; k++) s->along[k] = k;
    for (int k = 1; k <= R; k++) {
        s->left[k] = reflected(-k, w);
        s->right[k] = reflected(w - 1 + k, w);
    }
    return 1;
}

/* Row i: x' and y', and the four moments' sums along it. */
static void take_row(Work *s, const Plane *c, const float *x, const float *y, int i,
                     const float *window) {
    int w = s->w, j = 0;
    float *xs = s->x + i % (2 * K) * s->row, *ys = s->y + i % (2 * K) * s->row;
    x += (size_t)i * w, y += (size_t)i * w;
    for (; j + V <= w; j += V) {
        store(xs + j, (0.5f * load(x + j) - c->half_mean_x) * c->scale_x);
        store(ys + j, (0.5f * load(y + j) - c->half_mean_y) * c->scale_y);
    }
    for (; j < w; j++) {
        xs[j] = (0.5f * x[j] - c->half_mean_x) * c->scale_x;
        ys[j] = (0.5f * y[j] - c->half_mean_y) * c->scale_y;
    }
    for (j = 0; j < w; j += V) {
        vec a = load(xs + j), b = load(ys + j);
        store(s->wide[0] + R + j, a);
        store(s->wide[1] + R + j, b);
        store(s->wide[2] + R + j, a * a + b * b);
        store(s->wide[3] + R + j, a * b);
    }
    for (int q = 0; q < 4; q++) {
        float *cell = s->wide[q] + R;
        for (int k = 1; k <= R; k++) {
            cell[-k] = cell[s->left[k]];
            cell[w - 1 + k] = cell[s->right[k]];
        }
        filter(s->wide[q], s->along, window, w, s->moment[q] + i % K * s->row);
    }
}

/* Row o, whose moments are complete: returns the weighted sum of S / 4, and leaves the gradients
   of it for a, q / 2 and r in ``wide``, from cell 2 R on. */
static float score_row(Work *s, const Plane *c, int o, const float *window, const float *weights) {
    int w = s->w, j;
    ptrdiff_t down[K];
    for (int k = 0; k < K; k++) down[k] = reflected(o + k - R, s->h) % K * (ptrdiff_t)s->row;
    for (int q = 0; q < 4; q++) filter(s->moment[q], down, window, w, s->line[q]);
    memcpy(s->weight, weights + (size_t)o * w, w * sizeof(float));
    float *quarter = s->line[3];
    for (j = 0; j < w; j += V) {
        vec a = load(s->line[0] + j), b = load(s->line[1] + j);
        vec mean_x = a + c->shift_x, mean_y = b + c->shift_y;
        vec h1 = mean_x * mean_y + 0.5f * c->c1;
        vec b1 = mean_x * mean_x + mean_y * mean_y + c->c1;
        vec h2 = load(s->line[3] + j) - a * b + 0.5f * c->c2;
        vec b2 = load(s->line[2] + j) - a * a - b * b + c->c2;
        vec inverse = 1.0f / (b1 * b2 + c->eps);
        vec s4 = h1 * h2 * inverse, weight = load(s->weight + j), d = weight * inverse;
        store(quarter + j, weight * s4);
        vec g_r = h1 * d, minus_g_q = b1 * s4 * d;
        vec g_a = mean_y * h2 * d - b * g_r - 2.0f * (mean_x * b2 * s4 * d - a * minus_g_q);
        store(s->wide[0] + 2 * R + j, g_a);
        store(s->wide[1] + 2 * R + j, minus_g_q);
        store(s->wide[2] + 2 * R + j, g_r);
    }
    vec sum = {0};
    for (j = 0; j + V <= w; j += V) sum += load(quarter + j);
    float total = sum_of(sum);
    for (; j < w; j++) total += quarter[j];
    return total;
}

/* The adjoint, along row o, of the reflected filter: outside the row the gradients are 0, and what
   arrives there is folded back. */
static void return_row(Work *s, int o, const float *window) {
    int w = s->w;
    for (int q = 0; q < 3; q++) {
        float *to = s->back[q] + o % K * s->row, *cell = s->line[0] + R;
        memset(s->wide[q], 0, 2 * R * sizeof(float));
        memset(s->wide[q] + 2 * R + w, 0, 2 * R * sizeof(float));
        filter(s->wide[q], s->along, window, w + 2 * R, s->line[0]);
        memcpy(to, cell, w * sizeof(float));
        for (int k = 1; k <= R; k++) {
            to[s->left[k]] += cell[-k];
            to[s->right[k]] += cell[w - 1 + k];
        }
    }
}

/* Row i of the gradient g for x, stored times ``slope``; adds it, and g x, to the two sums. */
static void gradient_row(Work *s, const Plane *c, int i, const float *row_in, float slope,
                         float *grad, double *sum_g, double *sum_gx) {
    int w = s->w, j = 0;
    ptrdiff_t down[K];
    for (int k = 0; k < K; k++) {
        int near = i + k - R; /* outside the plane its weight is 0 */
        down[k] = (near < 0 ? 0 : near >= s->h ? s->h - 1 : near) % K * (ptrdiff_t)s->row;
    }
    for (int q = 0; q < 3; q++) filter(s->back[q], down, row_in + (size_t)i * K, w, s->line[q]);
    const float *x = s->x + i % (2 * K) * s->row, *y = s->y + i % (2 * K) * s->row;
    float *g = s->line[0];
    for (; j < w; j += V) {
        vec minus_g_q = load(s->line[1] + j), g_r = load(s->line[2] + j);
        store(g + j, load(g + j) - 2.0f * load(x + j) * minus_g_q + load(y + j) * g_r);
    }
    vec all_g = {0}, all_gx = {0};
    grad += (size_t)i * w;
    for (j = 0; j + V <= w; j += V) {
        vec v = load(g + j);
        all_g += v, all_gx += v * (load(x + j) + c->shift_x);
        store(grad + j, slope * v);
    }
    float row_g = sum_of(all_g), row_gx = sum_of(all_gx);
    for (; j < w; j++) {
        row_g += g[j], row_gx += g[j] * (x[j] + c->shift_x);
        grad[j] = slope * g[j];
    }
    *sum_g += row_g, *sum_gx += row_gx;
}

static void range_of(size_t cells, const float *x, const float *padding, float *out,
                     ptrdiff_t stride) {
    vec low = {0}, high = {0}, peak = {0};
    low += INFINITY, high -= INFINITY;
    float rest[V], rest_padding[V]; /* the last few cells, the very last one repeated */
    double some = 0;
    size_t counted = 0;
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
        if (j / V % 8 == 0) /* every eighth vector */
            for (int k = 0; k < V; k++) some += cell[k], counted++;
    }
    float most[3] = {low[0], high[0], peak[0]};
    for (int k = 1; k < V; k++) {
        if (low[k] < most[0]) most[0] = low[k];
        if (high[k] > most[1]) most[1] = high[k];
        if (peak[k] > most[2]) most[2] = peak[k];
    }
    for (int i = 0; i < 3; i++) out[i * stride] = most[i];
    out[3 * stride] = (float)(some / counted);
}

/*
Ranges of n planes of ``cells`` cells each, by ``threads`` threads.

padding: (cells,), 0 where a cell is valid and infinity where it is not. ranges: (4, stride),
written: lowest and highest valid value (infinity and -infinity if there is none), largest magnitude
of all cells, and the mean of some cells, near enough to the plane's for a shift. Values that are
not a number are passed over here; they show in the sums of ssim_planes.
*/
void plane_ranges(int threads, int n, size_t cells, const float *x, const float *padding,
                  float *ranges, ptrdiff_t stride) {
#pragma omp parallel for num_threads(threads)
    for (int plane = 0; plane < n; plane++)
        range_of(cells, x + plane * cells, padding, ranges + plane, stride);
}

/* Adds to a plane's gradient what its extrema receive, each share split between the cells that tie.
   The rest of the plane's cells is left as it is. */
static void spread_extrema(size_t cells, const float *x, const float *padding, float low,
                           float high, float to_low, float to_high, float *grad) {
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

/* All of the arguments of ssim_planes but the number of planes. */
typedef struct {
    int h, w;
    const float *x, *y;
    float *grad;
    const float *constants;
    ptrdiff_t stride;
    const float *window, *row_in, *weights;
    float gain;
    double *sums;
    const float *extrema, *padding;
} Planes;

static void ssim_plane(Work *s, const Planes *p, int plane) {
    Plane c;
    for (int i = 0; i < 9; i++) ((float *)&c)[i] = p->constants[i * p->stride + plane];
    size_t cells = (size_t)p->h * p->w;
    const float *x = p->x + plane * cells, *y = p->y + plane * cells;
    float *grad = p->grad ? p->grad + plane * cells : NULL, slope = 0.5f * p->gain * c.scale_x;
    double total = 0, sum_g = 0, sum_gx = 0;
    for (int i = 0; i < p->h + 2 * R; i++) {
        if (i < p->h) take_row(s, &c, x, y, i, p->window);
        if (i >= R && i - R < p->h) {
            total += score_row(s, &c, i - R, p->window, p->weights);
            if (grad) return_row(s, i - R, p->window);
        }
        if (grad && i >= 2 * R)
            gradient_row(s, &c, i - 2 * R, p->row_in, slope, grad, &sum_g, &sum_gx);
    }
    if (grad && p->extrema)
        spread_extrema(cells, x, p->padding, p->extrema[plane], p->extrema[p->stride + plane],
                       (float)(slope * (sum_gx - sum_g)), (float)(-slope * sum_gx), grad);
    double *sums = p->sums + plane;
    sums[0] = total, sums[p->stride] = sum_g, sums[2 * p->stride] = sum_gx;
}

/*
The sum of S / 4 over each of n planes, and its gradient, by ``threads`` threads. A plane is one
thread's, so that results do not depend on their number.

x, y, grad: (n, H, W), grad or NULL. constants: (9, stride), the fields of Plane, a column a plane.
window: (K,). row_in: (H, K), weights of rows i - R ... i + R where row i enters. weights: (H, W) of
the cells. gain: the gradient is for gain * sum(weights S / 4). sums: (3, stride), written: the sum
of weights S / 4, and of g, the gradient of that for x, sum(g) and sum(g x). extrema: (2, stride),
the lowest and the highest valid value, if cells are scaled by them and the gradient goes through
them; else NULL. padding: as in plane_ranges. Returns 0 if memory has run out.
*/
int ssim_planes(int threads, int n, int h, int w, const float *x, const float *y, float *grad,
                const float *constants, ptrdiff_t stride, const float *window, const float *row_in,
                const float *weights, float gain, double *sums, const float *extrema,
                const float *padding) {
    Planes p = {h, w, x, y, grad, constants, stride, window, row_in, weights, gain, sums,
                extrema, padding};
    int enough = 1;
#pragma omp parallel num_threads(threads)
    {
        Work s = {0};
        int ready = begin(&s, h, w);
        if (!ready) {
#pragma omp atomic write
            enough = 0;
        }
#pragma omp for
        for (int plane = 0; plane < n; plane++)
            if (ready) ssim_plane(&s, &p, plane);
        free(s.memory);
    }
    return enough;
}
