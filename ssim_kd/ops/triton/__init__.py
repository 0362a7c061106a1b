"""The SSIM loss in Triton, for CUDA and ROCm."""
