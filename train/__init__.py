"""Where the training program will stand. The fused loss it will use is ``Segmenter.loss``, which works today."""
