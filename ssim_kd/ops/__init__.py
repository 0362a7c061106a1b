"""Numerical kernels behind ``ssim_kd.losses``: torch alone; no configuration, no detector."""
