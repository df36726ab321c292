"""The engine seam: our CPU platform names our worker, which runs our adapter layers."""
