"""Sizes that several benchmarks share."""

# (M, N, K) of ViT-B-32's tower at batch 16, and others that its relatives have
LINEAR = [(800, 2304, 768), (800, 768, 768), (800, 3072, 768), (800, 768, 3072), (50, 3072, 768), (50, 768, 3072),
          (2056, 4096, 1024), (1, 768, 768)]  # fmt: skip
