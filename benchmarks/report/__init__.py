"""Reports from result files alone: the tables of README.md, and what changed between two folders."""
