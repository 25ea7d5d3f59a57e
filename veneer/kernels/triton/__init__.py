"""Triton kernels. Imported only by the module of the same name one level up, which holds the definition each is tested against.

Block sizes follow the bounds, not measurements. Float32 is exact unless torch.set_float32_matmul_precision allows less.
"""
