"""Fused ops for plain-ViT segmentation. ``reference`` holds the same names in plain PyTorch."""

if __name__ != "kernels":  # in a checkout, libraries that look for another package of that name import this folder
    from . import reference
    from .ops.attention import attention
    from .ops.lattice import lattice_argmax, lattice_softmax
    from .ops.mask_scores import mask_scores
    from .ops.tokens import best_match, bipartite_groups, merge_tokens, unit_rows
    from .ops.upsample import upsample_argmax, upsample_cross_entropy, upsample_softmax

    __all__ = [
        "attention",
        "best_match",
        "bipartite_groups",
        "lattice_argmax",
        "lattice_softmax",
        "mask_scores",
        "merge_tokens",
        "reference",
        "unit_rows",
        "upsample_argmax",
        "upsample_cross_entropy",
        "upsample_softmax",
    ]
