"""Stage 2: a student learns a score table."""
