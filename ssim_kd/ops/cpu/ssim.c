/*
SSIM and its gradient for planes of H x W float32 cells, compiled by build.py on first use.

ops/autograd.py has the notation and the algebra. V planes are processed together, one in each lane
of a vector, so that every cell is a full vector whatever the width. Everything between reading a
row and writing its gradient stays in a cache: the last K rows of x', y' and their products, and of
the gradients for the three moments. After row i is read, the moments of row i - R are complete, and
with them the gradient of row i - 2 R.

K, the window's size, is defined on the command line, so that the filters unroll.
*/
#include <stdlib.h>
#include <string.h>

#include "planes.h"
#include "vectors.h"

#define R (K / 2)

/* The cell to which position i of an axis of n cells folds back: see window.reflected_index. */
static int reflected(int i, int n) {
    if (i >= 0 && i < n) return i; /* the usual case; divisions are slow */
    if (n == 1) return 0;
    int period = 2 * (n - 1);
    i = (i % period + period) % period;
    return i < n ? i : period - i;
}

/* out[j] = sum_k weight[k] * in[at[k] + j] for j < n, and for one cell more if n is odd. Two cells
   at a time hide the latency of the sums. Not inlined, to leave all registers to taps and weights. */
static __attribute__((noinline)) void filter(const vec *in, const ptrdiff_t *at,
                                             const float *weight, int n, vec *out) {
    const vec *tap[K];
    vec weights[K];
    for (int k = 0; k < K; k++) tap[k] = in + at[k], weights[k] = filled(weight[k]);
    for (int j = 0; j < n; j += 2) {
        vec even = filled(0), odd = filled(0);
        for (int k = 0; k < K; k++) {
            even += weights[k] * tap[k][j];
            odd += weights[k] * tap[k][j + 1];
        }
        out[j] = even, out[j + 1] = odd;
    }
}

/* Constants of SSIM, and of the planes: x' = (cell / 2 - half_mean) * scale, and x = x' + shift. */
typedef struct {
    vec half_mean_x, scale_x, shift_x, half_mean_y, scale_y, shift_y;
    float c1, c2, eps;
} Constants;

typedef struct {
    int h, w;
    size_t row;                    /* cells of a padded row */
    vec *value[4], *gradient[3];   /* rings of K rows: x', y', x'^2 + y'^2, x'y'; for a, q / 2, r */
    vec *wide[4];                  /* a row with R more cells on either side, or 2 R */
    vec *line[4];                  /* a row with R more cells, or none */
    ptrdiff_t along[K];            /* taps along a row */
    int left[R + 1], right[R + 1]; /* the cells seen k cells beyond either end of a row */
} Work;

/* Allocates the buffers; returns the memory to free, or NULL if the allocation failed. */
static void *begin(Work *s, int h, int w) {
    s->h = h, s->w = w, s->row = (size_t)w + 4 * R + 2;
    size_t size = (7 * K + 8) * s->row * sizeof(vec);
    vec *memory = aligned_alloc(sizeof(vec), size), *p = memory;
    if (!memory) return NULL;
    memset(memory, 0, size);
    for (int i = 0; i < 4; i++) s->value[i] = p, p += K * s->row;
    for (int i = 0; i < 3; i++) s->gradient[i] = p, p += K * s->row;
    for (int i = 0; i < 4; i++) s->wide[i] = p, p += s->row;
    for (int i = 0; i < 4; i++) s->line[i] = p, p += s->row;
    for (int k = 0; k < K; k++) s->along[k] = k;
    for (int k = 1; k <= R; k++) {
        s->left[k] = reflected(-k, w);
        s->right[k] = reflected(w - 1 + k, w);
    }
    return memory;
}

static vec *ring(const Work *s, vec *rows, int i) { return rows + i % K * s->row; }

/* Reads row i of the planes, which start at x[l] and y[l], into the ring of values. */
static void read_row(Work *s, const Constants *constants, const float *const *x,
                     const float *const *y, int i) {
    const Constants c = *constants; /* a copy that no store can alias */
    vec *value[4];
    for (int q = 0; q < 4; q++) value[q] = ring(s, s->value[q], i);
    size_t start = (size_t)i * s->w;
    for (int l = 0; l < V; l++)
        for (int j = 0; j < s->w; j++)
            value[0][j][l] = x[l][start + j], value[1][j][l] = y[l][start + j];
    for (int j = 0; j < s->w; j++) {
        vec a = (0.5f * value[0][j] - c.half_mean_x) * c.scale_x;
        vec b = (0.5f * value[1][j] - c.half_mean_y) * c.scale_y;
        value[0][j] = a, value[1][j] = b, value[2][j] = a * a + b * b, value[3][j] = a * b;
    }
}

/* Returns the sums of the weighted S / 4 of row o, and writes their gradients for the moments into
   the ring. */
static vec score_row(Work *s, const Constants *constants, int o, const float *window,
                     const float *weights) {
    const Constants c = *constants;
    ptrdiff_t down[K];
    for (int k = 0; k < K; k++) down[k] = reflected(o + k - R, s->h) % K * (ptrdiff_t)s->row;
    for (int q = 0; q < 4; q++) {
        vec *first = s->wide[q] + R, *last = first + s->w - 1;
        filter(s->value[q], down, window, s->w, first);
        for (int k = 1; k <= R; k++) first[-k] = first[s->left[k]], last[k] = first[s->right[k]];
        filter(s->wide[q], s->along, window, s->w, s->line[q]);
    }
    vec *g_a = ring(s, s->gradient[0], o), *minus_g_q = ring(s, s->gradient[1], o);
    vec *g_r = ring(s, s->gradient[2], o), sum = filled(0), lost = filled(0);
    weights += (size_t)o * s->w;
    for (int j = 0; j < s->w; j++) {
        vec a = s->line[0][j], b = s->line[1][j];
        vec mean_x = a + c.shift_x, mean_y = b + c.shift_y;
        vec h1 = mean_x * mean_y + 0.5f * c.c1;
        vec b1 = mean_x * mean_x + mean_y * mean_y + c.c1;
        vec h2 = s->line[3][j] - a * b + 0.5f * c.c2;
        vec b2 = s->line[2][j] - a * a - b * b + c.c2;
        vec inverse = 1.0f / (b1 * b2 + c.eps), d = weights[j] * inverse, s4 = h1 * h2 * inverse;
        vec r = h1 * d, q = b1 * s4 * d;
        add(&sum, &lost, weights[j] * s4);
        g_a[j] = mean_y * h2 * d - b * r - 2.0f * (mean_x * b2 * s4 * d - a * q);
        minus_g_q[j] = q, g_r[j] = r;
    }
    return sum - lost;
}

/* The adjoint of the reflected filter along a row, which starts at cell 2 R of ``wide``. Gradients
   outside of the row are 0; results outside of it are folded back. Returns the row. */
static vec *back_along(const Work *s, vec *wide, vec *line, const float *window) {
    memset(wide, 0, 2 * R * sizeof(vec));
    memset(wide + 2 * R + s->w, 0, 2 * R * sizeof(vec));
    filter(wide, s->along, window, s->w + 2 * R, line);
    vec *first = line + R, *last = first + s->w - 1;
    for (int k = 1; k <= R; k++) first[s->left[k]] += first[-k], first[s->right[k]] += last[k];
    return first;
}

/* Row i of the gradient g for x, times ``slope``, into planes that start at grad[l]; the sums of g
   and g x along it. */
static void gradient_row(Work *s, const Constants *constants, int i, const float *window,
                         const float *row_in, vec slope, float *const *grad, int planes,
                         vec *sum_g, vec *sum_gx) {
    vec shift_x = constants->shift_x, all_g = filled(0), all_gx = filled(0), *moment[3];
    vec lost_g = filled(0), lost_gx = filled(0);
    ptrdiff_t down[K];
    for (int k = 0; k < K; k++) {
        int near = i + k - R; /* outside the plane its weight is 0 */
        down[k] = (near < 0 ? 0 : near >= s->h ? s->h - 1 : near) % K * (ptrdiff_t)s->row;
    }
    for (int q = 0; q < 3; q++) {
        filter(s->gradient[q], down, row_in + (size_t)i * K, s->w, s->wide[q] + 2 * R);
        moment[q] = back_along(s, s->wide[q], s->line[q], window);
    }
    const vec *x = ring(s, s->value[0], i), *y = ring(s, s->value[1], i);
    vec *scaled = s->line[3];
    for (int j = 0; j < s->w; j++) {
        vec g = moment[0][j] - 2.0f * x[j] * moment[1][j] + y[j] * moment[2][j];
        add(&all_g, &lost_g, g), add(&all_gx, &lost_gx, g * (x[j] + shift_x));
        scaled[j] = slope * g;
    }
    *sum_g = all_g - lost_g, *sum_gx = all_gx - lost_gx;
    for (int l = 0; l < planes; l++)
        for (int j = 0; j < s->w; j++) grad[l][(size_t)i * s->w + j] = scaled[j][l];
}

/* All of the arguments of ssim_planes but the number of threads. */
typedef struct {
    int n, h, w;
    const float *x, *y;
    float *grad;
    const float *constants;
    ptrdiff_t stride;
    float c1, c2, eps;
    const float *window, *row_in, *weights;
    float gain;
    double *sums;
    const float *extrema, *padding;
} Planes;

/* Planes first ... first + V - 1. If there are fewer, the last one fills the remaining lanes. */
static void ssim_lanes(Work *s, const Planes *p, int first) {
    int planes = p->n - first < V ? p->n - first : V;
    size_t cells = (size_t)p->h * p->w;
    Constants c = {.c1 = p->c1, .c2 = p->c2, .eps = p->eps};
    const float *x[V], *y[V];
    float *grad[V];
    for (int l = 0; l < V; l++) {
        int plane = first + (l < planes ? l : planes - 1);
        for (int i = 0; i < 6; i++) ((vec *)&c)[i][l] = p->constants[i * p->stride + plane];
        x[l] = p->x + plane * cells, y[l] = p->y + plane * cells;
        grad[l] = p->grad ? p->grad + plane * cells : NULL;
    }
    vec slope = 0.5f * p->gain * c.scale_x;
    double total[V] = {0}, sum_g[V] = {0}, sum_gx[V] = {0};
    for (int i = 0; i < p->h + 2 * R; i++) {
        vec row = filled(0), row_g = filled(0), row_gx = filled(0);
        if (i < p->h) read_row(s, &c, x, y, i);
        if (i >= R && i - R < p->h) row = score_row(s, &c, i - R, p->window, p->weights);
        if (p->grad && i >= 2 * R)
            gradient_row(s, &c, i - 2 * R, p->window, p->row_in, slope, grad, planes, &row_g,
                         &row_gx);
        for (int l = 0; l < V; l++)
            total[l] += row[l], sum_g[l] += row_g[l], sum_gx[l] += row_gx[l];
    }
    for (int l = 0; l < planes; l++) {
        double *sums = p->sums + first + l;
        sums[0] = total[l], sums[p->stride] = sum_g[l], sums[2 * p->stride] = sum_gx[l];
        if (!p->grad || !p->extrema) continue;
        const float *extrema = p->extrema + first + l;
        spread_extrema(cells, x[l], p->padding, extrema[0], extrema[p->stride],
                       (float)(slope[l] * (sum_gx[l] - sum_g[l])), (float)(-slope[l] * sum_gx[l]),
                       grad[l]);
    }
}

/*
The sum of S / 4 over each of n planes, and its gradient, by ``threads`` threads. Each plane belongs
to one thread, so that results do not depend on their number.

x, y, grad: (n, H, W); grad may be NULL. constants: (6, stride), the vectors of Constants, a column
for each plane. c1, c2, eps: the constants of SSIM. window: (K,). row_in: (H, K), the weights of row
i in the means of rows i - R ... i + R. weights: (H, W) of the cells. gain: the gradient is that of
gain * sum(weights S / 4). sums: (3, stride), written: the sum of weights S / 4, sum(g) and
sum(g x), where g is the gradient of the first for x. extrema: (2, stride), the lowest and the
highest valid value, if the gradient goes through the min-max scaling; else NULL. padding: as in
plane_ranges. Returns 0 if an allocation failed.
*/
int ssim_planes(int threads, int n, int h, int w, const float *x, const float *y, float *grad,
                const float *constants, ptrdiff_t stride, float c1, float c2, float eps,
                const float *window, const float *row_in, const float *weights, float gain,
                double *sums, const float *extrema, const float *padding) {
    Planes p = {n, h, w, x, y, grad, constants, stride, c1, c2, eps, window, row_in, weights,
                gain, sums, extrema, padding};
    int enough = 1, groups = (n + V - 1) / V;
    if (threads > groups) threads = groups;
#pragma omp parallel num_threads(threads)
    {
        Work s = {0};
        void *memory = begin(&s, h, w);
        if (!memory) {
#pragma omp atomic write
            enough = 0;
        }
#pragma omp for
        for (int first = 0; first < n; first += V)
            if (memory) ssim_lanes(&s, &p, first);
        free(memory);
    }
    return enough;
}
