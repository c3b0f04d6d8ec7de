"""The parts of ``accelerate``: fused forwards, trying them out, and the survey of a model."""
