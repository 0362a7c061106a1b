#ifndef SSIM_KD_PLANES_H
#define SSIM_KD_PLANES_H

#include <stddef.h>

/*
Ranges of n planes of ``cells`` cells each, by ``threads`` threads.

padding: (cells,), 0 where a cell is valid and infinity where it is not. ranges: (4, stride),
written: lowest and highest valid value (infinity and -infinity if there is none), largest magnitude
of all cells, and their mean. The first three ignore NaN, which shows in the sums of ssim_planes.
*/
void plane_ranges(int threads, int n, size_t cells, const float *x, const float *padding,
                  float *ranges, ptrdiff_t stride);

/* Adds the gradients for the extrema of a plane to its gradient, shared between cells that tie. */
void spread_extrema(size_t cells, const float *x, const float *padding, float low, float high,
                    float to_low, float to_high, float *grad);

#endif
