"""The Triton kernels: what runs on the device. Triton leaves them untyped."""
