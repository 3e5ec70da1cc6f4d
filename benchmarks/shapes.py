"""Sizes that several benchmarks share."""

# (M, N, K): ViT-B-32's tower at batch 16, a square, the towers at batch 1, ViT-L-14's fc1 at batch 8, a single row
LINEAR = [
    (800, 2304, 768),
    (800, 768, 768),
    (800, 3072, 768),
    (800, 768, 3072),
    (2048, 2048, 2048),
    (50, 2304, 768),
    (50, 3072, 768),
    (50, 768, 3072),
    (77, 1536, 512),
    (77, 2048, 512),
    (77, 512, 2048),
    (2056, 4096, 1024),
    (1, 768, 768),
]
# Few rows against weights that no cache holds
FEW_ROWS = [(1, 16384, 4096), (4, 16384, 4096)]
