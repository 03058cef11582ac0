"""Side-by-side measurements: each module prints a table and leaves a JSON file in benchmarks/results/."""
