"""Tasks, benchmarks and orders; one reader a file format, all into one in-memory form."""
