"""Reports from result files alone: the tables of the READMEs, and what changed between two folders."""
