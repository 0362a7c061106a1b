"""Numerical kernels of ``ssim_kd.losses``. They need only torch."""
