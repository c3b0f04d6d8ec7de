"""Fused ops for plain-ViT segmentation. ``reference`` holds the same names in plain PyTorch."""

if __name__ != "kernels":  # in a checkout, libraries that look for another package of that name import this folder
    from . import reference
    from .ops.attention import attention
    from .ops.lattice import lattice_argmax, lattice_softmax
    from .ops.mask_scores import mask_scores
    from .ops.upsample import upsample_argmax, upsample_cross_entropy, upsample_softmax

    __all__ = [
        "attention",
        "lattice_argmax",
        "lattice_softmax",
        "mask_scores",
        "reference",
        "upsample_argmax",
        "upsample_cross_entropy",
        "upsample_softmax",
    ]
