"""The tests. compile_kernels and update_driver are programs that they start."""
