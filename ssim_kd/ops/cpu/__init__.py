"""The SSIM loss in C, for a CPU."""
