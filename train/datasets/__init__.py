"""Images with labels: folders, and a procedural set."""
